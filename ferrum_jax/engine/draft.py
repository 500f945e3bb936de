"""Guesses at what comes next, from the sequence's own text: the tokens that followed its last few tokens before.

Saxena, "Prompt lookup decoding" (2023). A guess costs a wider step, so a sequence whose guesses fail pauses for twice as
many steps each time. Whether guesses are right changes the speed and nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ferrum_jax.engine.slots import Slots

_GRAMS = (4, 3)  # tokens that have to be the same; the longest that occurs counts
_MOST_MISSES = 5  # a pause is 2 ** 5 - 1 steps at most


def draft(slots: Slots, rows, alive, ends, most: int) -> tuple[Slots, jax.Array]:
    """Writes up to `most` guesses behind the texts of rows int32 [R]: the slots, and how many int32 [R]. Only rows that are
    alive guess, and only so much that their text stays shorter than `ends` int32 [R]."""
    text, length = slots.history[rows], slots.length[rows]
    capacity = text.shape[1]
    place = jnp.arange(capacity)
    found = jnp.zeros_like(length)  # behind the latest place with the same tokens; 0: none
    for size in _GRAMS:
        same = jnp.ones(text.shape, bool)
        for back in range(1, size + 1):
            token = jnp.take_along_axis(text, jnp.maximum(length - back, 0)[:, None], axis=1)
            same &= jnp.roll(text, back, axis=1) == token
        same &= (place >= size) & (place < length[:, None])
        found = jnp.where(found > 0, found, jnp.max(jnp.where(same, place, 0), axis=1))
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


def learn(slots: Slots, rows, guessed, right) -> Slots:
    """Notes how many guesses int32 [R] were right in the rows that guessed, bool [R]."""
    misses = jnp.where(right > 0, 0, jnp.minimum(slots.misses[rows] + 1, _MOST_MISSES))
    slot = jnp.where(guessed, rows, slots.length.shape[0])
    return slots._replace(
        misses=slots.misses.at[slot].set(misses, mode="drop"),
        pause=slots.pause.at[slot].set((1 << misses) - 1, mode="drop"),
    )
