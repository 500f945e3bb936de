"""The device's data of running sequences.

A slot is a place for one of them: its text, its counts and its parameters. So a step needs only the participating slots and
their pages from the host, and a sampled token goes into the next step without passing through the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ferrum_jax.choice import Adjustments, Choice
from ferrum_jax.sampling import PER_ROW, Sampling, occurred

BAD_WORDS, BAD_WORD_TOKENS = 64, 16  # limits of banned words with several tokens: their number and their length
MOST_FORCED = 32  # tokens that a grammar appends to a text at once


class Slots(NamedTuple):
    """The state of S slots. A slot's next token has the position `length`; the newest one, at `length` - 1, is not in the
    KV cache yet."""

    history: jax.Array  # int32 [S, C]: the text, followed by drafts or nothing
    length: jax.Array  # int32 [S]
    generated: jax.Array  # int32 [S]: tokens of output
    done: jax.Array  # bool [S]: ended
    seen: jax.Array  # int32 [S, V]: what `sample` counts
    bias: jax.Array  # float32 [S, V]: added to the logits
    banned: jax.Array  # int32 [S, BAD_WORDS, BAD_WORD_TOKENS]: words, left-padded with -1; the last token is banned
    min_tokens: jax.Array  # int32 [S]
    adjusted: jax.Array  # bool [S]: whether bias, banned or min_tokens have an effect
    constrained: jax.Array  # bool [S]: whether a grammar says which tokens may come next
    masked: jax.Array  # bool [S]: whether `mask` is that of the next token
    mask: jax.Array  # int32 [S, ceil(V / 32)]: the ids that the grammar admits, a bit each
    scored: jax.Array  # bool [S]: whether logprobs are requested
    scored_prompt: jax.Array  # bool [S]: whether those of the prompt are requested
    prompt_length: jax.Array  # int32 [S]
    adapter: jax.Array  # int32 [S]: its index among the model's, -1 for none
    misses: jax.Array  # int32 [S]: consecutive drafts that missed (see draft.py)
    pause: jax.Array  # int32 [S]: remaining steps without a draft
    sampling: Sampling  # of S rows

    def choosing(self, rows: jax.Array) -> jax.Array:
        """bool [R]: which of the rows int32 [R] can choose a token: a grammar's mask serves for one token."""
        return ~self.constrained[rows] | self.masked[rows]

    @property
    def choice(self) -> Choice:
        """The state that choosing a token depends on."""
        adjustments = Adjustments(**{name: getattr(self, name) for name in Adjustments._fields})
        return Choice(self.length, self.generated, self.done, self.seen, adjustments)

    def with_choice(self, choice: Choice) -> Slots:
        """These slots with the state after choosing."""
        return self._replace(length=choice.length, generated=choice.generated, done=choice.done, seen=choice.seen)


class Admission(NamedTuple):
    """The contents of a slot: its text int32 [C], its lengths, and its parameters; `sampling` has one row."""

    slot: Any
    text: Any
    length: Any
    prompt_length: Any
    bias_ids: Any  # int32 [MAX_BIAS], padded with vocab_size
    bias: Any  # float32 [MAX_BIAS]
    banned: Any
    min_tokens: Any
    constrained: Any
    scored: Any
    scored_prompt: Any
    adapter: Any
    sampling: Sampling


def new_slots(sampling: Sampling, *, slots: int, capacity: int, vocab: int) -> Slots:
    """Empty slots for texts of up to `capacity` tokens. sampling: of `slots` rows, all padding."""

    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    flag = zeros(dtype=bool)
    return Slots(
        history=zeros(capacity),
        length=zeros() + 1,
        generated=zeros(),
        done=~flag,
        seen=zeros(vocab),
        bias=zeros(vocab, dtype=jnp.float32),
        banned=zeros(BAD_WORDS, BAD_WORD_TOKENS) - 1,
        min_tokens=zeros(),
        adjusted=flag,
        constrained=flag,
        masked=flag,
        mask=zeros(-(-vocab // 32)),
        scored=flag,
        scored_prompt=flag,
        prompt_length=zeros(),
        adapter=zeros() - 1,
        misses=zeros(),
        pause=zeros(),
        sampling=jax.tree.map(jnp.asarray, sampling),
    )


def admit(slots: Slots, admission: Admission) -> Slots:
    """Puts a sequence into a slot; the output that a preempted sequence already has counts as output."""
    capacity, vocab = slots.history.shape[1], slots.seen.shape[1]
    position = jnp.arange(capacity)
    prompt = jnp.where(position < admission.prompt_length, admission.text, vocab)
    output = jnp.where((position >= admission.prompt_length) & (position < admission.length), admission.text, vocab)
    seen = jnp.zeros((vocab,), jnp.int32).at[prompt].set(1, mode="drop").at[output].add(2, mode="drop")
    bias = jnp.zeros((vocab,), jnp.float32).at[admission.bias_ids].add(admission.bias, mode="drop")
    words = (admission.banned[:, -1] >= 0).any()
    adjusted = words | (admission.min_tokens > 0) | (admission.bias_ids < vocab).any()
    values = {
        "history": admission.text,
        "length": admission.length,
        "generated": admission.length - admission.prompt_length,
        "done": False,
        "seen": seen,
        "bias": bias,
        "banned": admission.banned,
        "min_tokens": admission.min_tokens,
        "adjusted": adjusted,
        "constrained": admission.constrained,
        "masked": False,
        "mask": 0,
        "scored": admission.scored,
        "scored_prompt": admission.scored_prompt,
        "prompt_length": admission.prompt_length,
        "adapter": admission.adapter,
        "misses": 0,
        "pause": 0,
    }

    def put(array: jax.Array, value: Any) -> jax.Array:
        return array.at[admission.slot].set(value)

    sampling = slots.sampling._replace(
        **{name: put(getattr(slots.sampling, name), getattr(admission.sampling, name)[0]) for name in PER_ROW}
    )
    return Slots(**{name: put(getattr(slots, name), value) for name, value in values.items()}, sampling=sampling)


def mask(slots: Slots, rows: jax.Array, forced: jax.Array, masks: jax.Array) -> Slots:
    """Appends what the grammars of some slots, int32 [M], force to their texts, int32 [M, MOST_FORCED], padded with -1; then
    sets what they admit next: int32 [M, ceil(V / 32)]. A slot out of range changes nothing."""
    there, begin = forced >= 0, slots.length[rows, None]
    position = jnp.where(there, begin + jnp.arange(forced.shape[1]), slots.history.shape[1])
    count = there.sum(axis=1, dtype=jnp.int32)
    return slots._replace(
        history=slots.history.at[rows[:, None], position].set(forced, mode="drop"),
        length=slots.length.at[rows].add(count, mode="drop"),
        generated=slots.generated.at[rows].add(count, mode="drop"),
        seen=occurred(slots.seen, rows[:, None], jnp.where(there, forced, slots.seen.shape[1])),
        mask=slots.mask.at[rows].set(masks, mode="drop"),
        masked=slots.masked.at[rows].set(True, mode="drop"),
    )
