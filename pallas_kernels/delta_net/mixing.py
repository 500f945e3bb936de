"""What comes before the memories of a gated delta net, in XLA for all kernels: convolution, tails, normalized queries and keys.

This stays with XLA because it is small: a token of 8,192 channels with four taps moves 100 KB of tails, its memory of 32 heads
of 128 x 128 moves 4 MB.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.delta_net.parts import Operands
from pallas_kernels.delta_net.xla import heads_of

# Tokens up to which TPUs gather and scatter tails. Of more they would hold all that a scatter may write, filled up to eight
# rows; and a v5p copies the whole array for a gather or scatter of any size.
_FEW = 64


class Mixed(NamedTuple):
    """Of each token, float32: q, k [tokens, H, dk], normalized; v [tokens, H, dv]; log_decay, beta [tokens, H]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    beta: jax.Array


def mixed(operands: Operands, tiled: bool) -> tuple[Mixed, jax.Array]:
    """What the memories are given, and the tails after the step."""
    qkv, log_decay, beta, taps, state, layer, sequences = operands
    tokens, count = qkv.shape[0], taps.shape[1] - 1
    layers, places = state.tail.shape[:2]
    flat = state.tail.reshape(-1, *state.tail.shape[2:])  # a single index: with two, TPUs copy the array
    target = dispatch.target()
    one_by_one = target.platform == "tpu" and (tokens > _FEW or target.model == "v5p")
    if one_by_one:
        before = lax.map(lambda place: lax.dynamic_index_in_dim(flat, place, keepdims=False), layer * places + sequences.reads)
    else:
        before = flat.at[layer * places + sequences.reads].get(mode="clip")
    # Read before tails are written: fused into the write, the read would need a copy of all of them.
    before = lax.optimization_barrier(jnp.where(sequences.begins[:, None, None], 0.0, before))
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = row_of(sequences.starts, tokens)
    offset = token - sequences.starts[row]
    window = [qkv]  # of each token, the rows from K - 1 tokens before it on
    for back in range(1, count + 1):
        earlier = jnp.pad(qkv, ((back, 0), (0, 0)))[:tokens]
        kept = before[row, jnp.clip(count + offset - back, 0, count - 1)]
        window.insert(0, jnp.where((offset >= back)[:, None], earlier, kept))
    summed = sum(taps[:, i] * part for i, part in enumerate(window))

    def write(i: jax.Array, tails: jax.Array) -> jax.Array:
        """With the tail after the i-th token that has one to keep."""
        t = kept_first[i]
        rows = []
        for back in reversed(range(count)):
            old = before[row[t], jnp.clip(count + offset[t] - back, 0, count - 1)]
            rows.append(jnp.where(offset[t] >= back, qkv[jnp.maximum(t - back, 0)], old))
        return lax.dynamic_update_index_in_dim(tails, jnp.stack(rows), layer * places + sequences.writes[t], 0)

    if one_by_one:
        kept_first = jnp.argsort(sequences.writes < 0, stable=True)
        tail = lax.fori_loop(0, jnp.sum(sequences.writes >= 0, dtype=jnp.int32), write, flat)
    else:
        # Tokens whose tail is not kept get different places after the end, so that all differ.
        place = layer * places + sequences.writes
        place = jnp.where(sequences.writes < 0, layers * places + token, place)
        tail = flat.at[place].set(jnp.stack(window[1:], axis=1), mode="drop", unique_indices=True)
    q, k, v = heads_of(jax.nn.silu(summed), state.memory.shape[2:], tiled)
    return Mixed(q, k, v, log_decay, beta), tail.reshape(state.tail.shape)


def row_of(starts: jax.Array, tokens: int) -> jax.Array:
    """The sequence of each token; any of them after the last token that has one."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    return jnp.clip(jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1, 0, starts.shape[0] - 2)
