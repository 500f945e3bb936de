"""Choosing the next token of each row: the only place where logits become a token.

`functional.generate` and the engine's steps both end here, so a request gets the same tokens from either. `Choice` is the
state that choosing a token reads and updates, in addition to the logits and the sampling parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.sampling import Sampling, is_end, occurred, sample, token_logprobs
from pallas_kernels.reductions import row_max

NOT_FINITE = -2  # instead of a token: the row's logits contain NaN or +inf, or are all -inf


class Adjustments(NamedTuple):
    """Changes to the logits of S rows before sampling; V ids, texts of up to C tokens."""

    adjusted: jax.Array  # bool [S]: whether the row uses any of these
    history: jax.Array  # int32 [S, C]: the tokens of the text
    prompt_length: jax.Array  # int32 [S]
    bias: jax.Array  # float32 [S, V]: added to the logits
    banned: jax.Array  # int32 [S, words, tokens]: right-aligned and padded with -1; the last token of a word is banned
    min_tokens: jax.Array  # int32 [S]: end tokens are banned before the output has this many
    constrained: jax.Array  # bool [S]: whether the row has a grammar
    mask: jax.Array  # int32 [S, ceil(V / 32)]: the ids that it admits next, a bit each, the lowest bit first


class Choice(NamedTuple):
    """The state of S rows; V ids."""

    length: jax.Array  # int32 [S]: tokens of prompt and output; the next one has this position
    generated: jax.Array  # int32 [S]: tokens of output
    done: jax.Array  # bool [S]: ended by an end token, max_tokens, or logits that are not finite
    seen: jax.Array  # int32 [S, V]: which ids occurred in prompt and output, as `sample` counts them
    adjustments: Adjustments | None = None  # None: no row uses any


class Chosen(NamedTuple):
    """The tokens of R rows.

    token int32 [R]: -1 in a row that was not alive, NOT_FINITE in a row whose logits were not finite. ids int32 and logprobs
    float32 [R, k + 1]: the token and the k best of the raw distribution, or zeros if they were not requested.
    """

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
    requested: jax.Array | None = None,
) -> tuple[Choice, Chosen]:
    """Chooses the next token of the rows that are alive. The other rows stay as they are.

    Args:
      logits: float32 [R, V].
      choice: the state of S rows.
      sampling: the parameters of the S rows.
      key: as for `sample`.
      alive: bool [R].
      rows: int32 [R], which of the S rows the logits belong to; None: all, in order.
      logprobs: the number of best tokens to report; None for no log-probabilities; static.
      requested: bool [], whether this call computes log-probabilities; None: yes.
    """
    count, capacity = logits.shape[0], choice.length.shape[0]
    every = jnp.arange(count) if rows is None else rows

    def of(array: jax.Array) -> jax.Array:
        return array if rows is None else array[rows]

    with jax.named_scope("sampling"):
        own = sampling if rows is None else sampling.take(rows)
        top = row_max(logits)[:, 0]
        adjusted, most = logits, top
        if choice.adjustments is not None:
            used = choice.adjustments.adjusted[every] | choice.adjustments.constrained[every]
            adjusted, most = lax.cond((alive & used).any(), _restrict, lambda x, *_: (x, top), logits, choice, own, every)
        finite = (top < jnp.inf) & (most > -jnp.inf)  # the largest is NaN if any is
        token = sample(adjusted, own, of(choice.seen), of(choice.length), key)
        ids, scores = _scores(logits, token, logprobs, requested)
        generated = of(choice.generated) + finite
        done = is_end(token, own) | (generated >= own.max_tokens) | ~finite
        target = jnp.where(alive, every, capacity)  # an index out of range writes nothing
        choice = choice._replace(
            length=choice.length.at[target].add(1, mode="drop"),
            generated=choice.generated.at[target].set(generated, mode="drop"),
            done=choice.done.at[target].set(done, mode="drop"),
            seen=occurred(choice.seen, target, token),
        )
        return choice, Chosen(jnp.where(alive, jnp.where(finite, token, NOT_FINITE), -1), ids, scores)


def if_requested(requested: jax.Array, scores: Callable[[], Any]) -> Any:
    """The arrays of `scores()`, or zeros of the same shapes."""
    return lax.cond(requested, scores, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(scores)))


def _scores(
    logits: jax.Array, token: jax.Array, logprobs: int | None, requested: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if logprobs is None:
        return jnp.zeros((logits.shape[0], 0), jnp.int32), jnp.zeros((logits.shape[0], 0), jnp.float32)
    if requested is None:
        return token_logprobs(logits, token, logprobs)
    return if_requested(requested, lambda: token_logprobs(logits, token, logprobs))


def _restrict(logits: jax.Array, choice: Choice, sampling: Sampling, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits after grammars and adjustments, and the largest [R] of those that a grammar admits."""
    what = choice.adjustments
    assert what is not None
    constrained = what.constrained[rows]
    admitted = lax.cond(constrained.any(), _admit, lambda x, *_: x, logits, what, rows)
    adjusted = lax.cond(what.adjusted[rows].any(), _adjust, lambda x, *_: x, admitted, choice, sampling, rows)
    stuck = constrained & (row_max(adjusted)[:, 0] == -jnp.inf)  # what the grammar needs was banned
    return jnp.where(stuck[:, None], admitted, adjusted), row_max(admitted)[:, 0]


def _admit(logits: jax.Array, what: Adjustments, rows: jax.Array) -> jax.Array:
    """The logits of what grammars admit, -inf for all other tokens of their rows."""
    bits = (what.mask[rows][:, :, None] >> jnp.arange(32)) & 1  # [R, words, 32]
    admitted = bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(admitted | ~what.constrained[rows][:, None], logits, -jnp.inf)


def _adjust(logits: jax.Array, choice: Choice, sampling: Sampling, rows: jax.Array) -> jax.Array:
    """The logits with biases, and -inf for tokens that would complete a banned word or end the text too early."""
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
