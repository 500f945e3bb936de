"""Guesses at what comes next, from the sequence's own text: the tokens that followed its last few tokens before.

Saxena, "Prompt lookup decoding" (2023). A guess costs a wider step, so a sequence whose guesses fail pauses for twice as
many steps each time, and a batch in which few sequences guess does not verify them. Whether guesses are right changes the
speed and nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ferrum_jax.engine.slots import Slots

_LEAST, _MOST = 3, 5  # tokens that have to be the same: one more after each miss
_MOST_MISSES = 5  # a pause is 2 ** 5 - 1 steps at most


def draft(slots: Slots, rows: jax.Array, alive: jax.Array, ends: jax.Array, most: int) -> tuple[Slots, jax.Array]:
    """Writes up to `most` guesses behind the texts of rows int32 [R]: the slots, and how many int32 [R]. Only rows that are
    alive guess, and only so much that their text stays shorter than `ends` int32 [R]."""
    text, length = slots.history[rows], slots.length[rows]
    capacity = text.shape[1]
    # The latest position after the most tokens that are the same as the newest ones: _LEAST of them, then one more, ...
    position = jnp.arange(_MOST, capacity)
    same = position < length[:, None]
    level = jnp.zeros(same.shape, jnp.int32)
    for back in range(1, _MOST + 1):
        newest = jnp.take_along_axis(text, jnp.maximum(length - back, 0)[:, None], axis=1)
        same &= text[:, _MOST - back : capacity - back] == newest
        level += same & (back >= _LEAST)
    best = jnp.max(level * capacity + position, axis=1)
    needed = 1 + jnp.minimum(slots.misses[rows], _MOST - _LEAST)
    found = jnp.where(best // capacity >= needed, best % capacity, 0)
    resting = slots.pause[rows] > 0
    count = jnp.where(alive & (found > 0) & ~resting, jnp.clip(ends - length - 1, 0, most), 0)

    slot = jnp.where(alive, rows, slots.length.shape[0])
    offset = jnp.arange(most)
    period = jnp.maximum(length - found, 1)  # what followed ends with the text, and then begins again
    guess = jnp.take_along_axis(text, jnp.clip(found[:, None] + offset % period[:, None], 0, capacity - 1), axis=1)
    target = jnp.where(offset < count[:, None], length[:, None] + offset, capacity)
    slots = slots._replace(
        history=slots.history.at[slot[:, None], target].set(guess, mode="drop"),
        pause=slots.pause.at[slot].add(jnp.where(resting, -1, 0), mode="drop"),
    )
    return slots, count


def worth_it(drafted: jax.Array, alive: jax.Array) -> jax.Array:
    """Whether to verify guesses, int32 [R] of rows that are alive, bool [R]: the wider step is paid by all rows, so half of
    them have to gain by it."""
    return (drafted > 0).any() & (2 * (drafted > 0).sum() >= alive.sum())


def learn(slots: Slots, rows: jax.Array, drafted: jax.Array, right: jax.Array) -> Slots:
    """Notes how many guesses int32 [R] were right of those that were verified, int32 [R]; less than half is a miss."""
    misses = jnp.where(2 * right >= drafted, 0, jnp.minimum(slots.misses[rows] + 1, _MOST_MISSES))
    slot = jnp.where(drafted > 0, rows, slots.length.shape[0])
    return slots._replace(
        misses=slots.misses.at[slot].set(misses, mode="drop"),
        pause=slots.pause.at[slot].set((1 << misses) - 1, mode="drop"),
    )
