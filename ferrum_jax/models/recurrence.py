"""Where layers that recur read and write their states in one ragged step: an input of their modules.

A state array is [layers, states, ...]. A sequence's state before its first token of the step is read from its place, or is
zeros at position 0; the state after a token is written where `writes` says. Whatever form computes the states between (a scan
over tokens, chunks), the result for a token must not depend on how a sequence was cut into steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Recurrence(NamedTuple):
    """Of T tokens of S sequences; all int32 unless stated.

    Attributes:
      starts: [S + 1]; tokens of sequence s are starts[s] .. starts[s + 1] - 1.
      positions: [T], of each token in its sequence.
      row: [T], the sequence of each token; any for padding.
      first: bool [T], whether the token is its sequence's first of the step.
      begins: bool [S], whether the sequence begins with this step.
      reads: [S], the place of its state.
      writes: [T], the place for the state after each token, -1 for nowhere.
    """

    starts: jax.Array
    positions: jax.Array
    row: jax.Array
    first: jax.Array
    begins: jax.Array
    reads: jax.Array
    writes: jax.Array

    def read(self, array: jax.Array, layer: jax.Array | int) -> jax.Array:
        """[S, ...]: the states of a layer before the step, of an array [layers, states, ...]."""
        state = array.at[layer, self.reads].get(mode="clip")
        return jnp.where(self.begins.reshape(-1, *[1] * (state.ndim - 1)), 0.0, state)

    def write(self, array: jax.Array, layer: jax.Array | int, after: jax.Array) -> jax.Array:
        """The array with the states after tokens, [T, ...], written to their places."""
        place = jnp.where(self.writes < 0, array.shape[1], self.writes)
        return array.at[layer, place].set(after, mode="drop")


def recurrence(
    positions: jax.Array,
    query_starts: jax.Array,
    live: jax.Array,
    states: jax.Array | None = None,
    writes: jax.Array | None = None,
) -> Recurrence:
    """Made from a batch: positions int32 [T], query_starts int32 [S + 1], live bool [T]: not padding; states, writes: as in
    `RaggedBatch`."""
    tokens, count = positions.shape[0], query_starts.shape[0] - 1
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(query_starts, token, side="right") - 1, 0, count - 1).astype(jnp.int32)
    reads = jnp.arange(count, dtype=jnp.int32) if states is None else jnp.maximum(states, 0)
    if writes is None:
        writes = jnp.where(token == query_starts[row + 1] - 1, reads[row], -1)
    begins = positions[jnp.clip(query_starts[:-1], 0, tokens - 1)] == 0
    first, writes = token == query_starts[row], jnp.where(live, writes, -1)
    return Recurrence(query_starts, positions, row, first, begins, reads, writes)
