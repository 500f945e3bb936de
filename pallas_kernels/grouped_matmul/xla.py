"""Grouped matmul in plain XLA: a loop over the tiles that exist, each one expert's matrix times a few of its rows.

The trip count is the number of tiles that have rows, computed on the device, so an expert that no token chose costs nothing. A
tile always takes `rows` rows from its start; rows after the end of its group get wrong results, which are overwritten: tiles
are visited in ascending order, and the next group's tile writes the same rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Target
from pallas_kernels.quantized_matmul import xla as dense


def grouped(x: jax.Array, group_sizes: jax.Array, matrices: Matrix, target: Target, *, transposed: bool = False) -> jax.Array:
    """[m, k] -> float32 [m, n] (or [m, n] -> [m, k] when transposed), rows sorted by expert."""
    m, experts = x.shape[0], group_sizes.shape[0]
    multiply = dense.matmul_transposed if transposed else dense.matmul
    width_out = matrices.columns if transposed else matrices.rows

    rows = tile_rows(m, experts)
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // rows)
    tile_ends = jnp.cumsum(tiles)
    padded = jnp.pad(x, ((0, rows), (0, 0)))

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        expert = jnp.sum(tile_ends <= i, dtype=jnp.int32)
        first = tile_ends[expert] - tiles[expert]
        start = ends[expert] - group_sizes[expert] + (i - first) * rows
        part = lax.dynamic_slice(padded, (start, 0), (rows, x.shape[1]))
        return lax.dynamic_update_slice(y, multiply(part, matrices.at(expert), target), (start, 0))

    y = lax.fori_loop(0, tile_ends[-1], body, jnp.zeros((m + rows, width_out), jnp.float32))[:m]
    return jnp.where(jnp.arange(m)[:, None] < ends[-1], y, 0.0)


def tile_rows(m: int, experts: int) -> int:
    """About twice the average number of rows per expert, from 16 to 256, but not more than there are.

    Unpacking costs as much as about sixty rows of the product, so most experts should need only one tile.
    """
    average = max(16, min(256, 2 * m // experts))
    return min(max(2, m), 1 << (average - 1).bit_length())
