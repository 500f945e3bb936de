"""Choosing the next token of a row: the one place where logits become a token.

`functional.generate` and the engine's steps both end here, so a request gets the same token on either way. `Choice` holds
all that a choice depends on and changes next to the logits and the parameters of sampling.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.sampling import Sampling, is_end, occurred, sample, token_logprobs

NOT_FINITE = -2  # in the place of a token: the row's logits hold NaN or +inf, or nothing but -inf


class Adjustments(NamedTuple):
    """What is done to the logits of S rows before one is sampled; V ids, texts of up to C tokens."""

    adjusted: jax.Array  # bool [S]: whether anything below says something
    history: jax.Array  # int32 [S, C]: the text
    prompt_length: jax.Array  # int32 [S]
    bias: jax.Array  # float32 [S, V]: added to the logits
    banned: jax.Array  # int32 [S, words, tokens]: right-aligned, -1 before the first; the last token is banned
    min_tokens: jax.Array  # int32 [S]: end tokens are banned before the output has this many


class Choice(NamedTuple):
    """Where S rows stand. V ids."""

    length: jax.Array  # int32 [S]: tokens of prompt and output; the next one has this position
    generated: jax.Array  # int32 [S]: tokens of output
    done: jax.Array  # bool [S]: ended by an end token, max_tokens, or logits that are not finite
    seen: jax.Array  # int32 [S, V]: what `sample` counts of prompt and output
    adjustments: Adjustments | None = None  # None: no row has any


class Chosen(NamedTuple):
    """Of R rows. token int32 [R]: -1 in a row that was not alive, NOT_FINITE where its logits were not; ids int32 and
    logprobs float32 [R, k + 1]: the token and the k best, of the raw distribution, zeros where they were not wanted."""

    token: jax.Array
    ids: jax.Array
    logprobs: jax.Array


def choose(
    logits: jax.Array,
    choice: Choice,
    sampling: Sampling,
    key: jax.Array,
    alive: jax.Array,
    rows: jax.Array | None = None,
    *,
    logprobs: int | None = None,
    wanted: jax.Array | None = None,
) -> tuple[Choice, Chosen]:
    """Chooses the next token of the rows that are alive; in the others nothing changes.

    logits float32 [R, V], of `rows` int32 [R] of the S that `choice` and `sampling` have (None: of all, in order); alive
    bool [R]; key: as for `sample`; logprobs: how many of the best tokens to report (None: no log-probabilities at all);
    wanted bool []: whether to compute them (None: yes).
    """
    count, capacity = logits.shape[0], choice.length.shape[0]
    every = jnp.arange(count) if rows is None else rows

    def of(array: jax.Array) -> jax.Array:
        return array if rows is None else array[rows]

    with jax.named_scope("sampling"):
        own = sampling if rows is None else sampling.take(rows)
        finite = (logits < jnp.inf).all(axis=1) & (logits > -jnp.inf).any(axis=1)
        adjusted = logits
        if choice.adjustments is not None:
            some = (alive & choice.adjustments.adjusted[every]).any()
            adjusted = lax.cond(some, _adjust, lambda x, *_: x, logits, choice, own, every)
        token = sample(adjusted, own, of(choice.seen), of(choice.length), key)
        ids, scores = _scores(logits, token, logprobs, wanted)
        generated = of(choice.generated) + finite
        done = is_end(token, own) | (generated >= own.max_tokens) | ~finite
        place = jnp.where(alive, every, capacity)  # out of range: nothing is written
        choice = choice._replace(
            length=choice.length.at[place].add(1, mode="drop"),
            generated=choice.generated.at[place].set(generated, mode="drop"),
            done=choice.done.at[place].set(done, mode="drop"),
            seen=occurred(choice.seen, place, token),
        )
        return choice, Chosen(jnp.where(alive, jnp.where(finite, token, NOT_FINITE), -1), ids, scores)


def where_wanted(wanted, scores):
    """ids and logprobs of `scores()`, or zeros."""
    return lax.cond(wanted, scores, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(scores)))


def _scores(logits, token, logprobs: int | None, wanted) -> tuple[jax.Array, jax.Array]:
    if logprobs is None:
        return jnp.zeros((logits.shape[0], 0), jnp.int32), jnp.zeros((logits.shape[0], 0), jnp.float32)
    if wanted is None:
        return token_logprobs(logits, token, logprobs)
    return where_wanted(wanted, lambda: token_logprobs(logits, token, logprobs))


def _adjust(logits, choice: Choice, sampling: Sampling, rows) -> jax.Array:
    """The logits with biases, words that are banned, and end tokens that come too early."""
    what = choice.adjustments
    assert what is not None
    count, vocab = logits.shape
    row = jnp.arange(count)[:, None]
    words = what.banned[rows]
    index = choice.length[rows][:, None] + jnp.arange(1 - words.shape[-1], 0)
    is_output = index >= what.prompt_length[rows][:, None]
    recent = jnp.where(is_output, what.history[rows[:, None], jnp.maximum(index, 0)], -2)
    begun = ((words[..., :-1] < 0) | (words[..., :-1] == recent[:, None])).all(axis=-1) & (words[..., -1] >= 0)
    early = (choice.generated[rows] < what.min_tokens[rows])[:, None] & (sampling.eos >= 0)
    x = logits + what.bias[rows]
    x = x.at[row, jnp.where(begun, words[..., -1], vocab)].set(-jnp.inf, mode="drop")
    return x.at[row, jnp.where(early, sampling.eos, vocab)].set(-jnp.inf, mode="drop")
