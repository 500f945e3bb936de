"""Guesses the next tokens from the sequence's own text: those that followed an earlier occurrence of its last few tokens.

Saxena, "Prompt lookup decoding" (2023). A guess costs a wider step, so a sequence whose guesses fail pauses twice as long each
time, and a batch in which few sequences have a guess does not verify them. Right or wrong guesses change only the speed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ferrum_jax.engine.slots import Slots

_LEAST, _MOST = 3, 5  # tokens that must be equal: one more after each miss
_MOST_MISSES = 5  # a pause lasts at most 2 ** 5 - 1 steps


def draft(slots: Slots, rows: jax.Array, alive: jax.Array, ends: jax.Array, most: int) -> tuple[Slots, jax.Array]:
    """Writes up to `most` guesses after the texts of rows int32 [R]; returns the slots and the number of guesses int32 [R].
    Only rows that are alive and have no grammar guess, and their text stays shorter than `ends` int32 [R]."""
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
    count = jnp.where(alive & ~slots.constrained[rows] & (found > 0) & ~resting, jnp.clip(ends - length - 1, 0, most), 0)

    slot = jnp.where(alive, rows, slots.length.shape[0])
    offset = jnp.arange(most)
    period = jnp.maximum(length - found, 1)  # what followed ends with the text and then repeats
    guess = jnp.take_along_axis(text, jnp.clip(found[:, None] + offset % period[:, None], 0, capacity - 1), axis=1)
    target = jnp.where(offset < count[:, None], length[:, None] + offset, capacity)
    slots = slots._replace(
        history=slots.history.at[slot[:, None], target].set(guess, mode="drop"),
        pause=slots.pause.at[slot].add(jnp.where(resting, -1, 0), mode="drop"),
    )
    return slots, count


def worth_it(drafted: jax.Array, alive: jax.Array) -> jax.Array:
    """Whether to verify the guesses (int32 [R]) of the rows that are alive (bool [R]): all rows pay for the wider step, so at
    least half of them must have a guess."""
    return (drafted > 0).any() & (2 * (drafted > 0).sum() >= alive.sum())


def learn(slots: Slots, rows: jax.Array, drafted: jax.Array, right: jax.Array) -> Slots:
    """Records how many guesses (`right` int32 [R]) of those verified (`drafted` int32 [R]) were right; less than half is a
    miss."""
    misses = jnp.where(2 * right >= drafted, 0, jnp.minimum(slots.misses[rows] + 1, _MOST_MISSES))
    slot = jnp.where(drafted > 0, rows, slots.length.shape[0])
    return slots._replace(
        misses=slots.misses.at[slot].set(misses, mode="drop"),
        pause=slots.pause.at[slot].set((1 << misses) - 1, mode="drop"),
    )
