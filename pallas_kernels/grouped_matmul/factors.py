"""Grouped products with plain matrices that have a derivative: the factors of LoRA adapters, one pair for each expert.

`grouped_factor(x, group_sizes, w)` is `grouped_matmul` with w float32 [E, n, k]; its derivative is with respect to x and w. An
expert without rows costs nothing but the zeros of its derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.grouped_matmul import xla


class Pair(NamedTuple):
    """What an adapter adds to a product x W^T: scale x A^T B^T. a float32 [rank, in] and b [out, rank]; or of E experts, [E,
    rank, in] and [E, out, rank], also as matrices, which have no derivative. mask: bool [tokens, rank], which numbers of x A^T
    count, if not all of them do."""

    a: Any
    b: Any
    scale: float
    mask: jax.Array | None = None


@jax.custom_vjp
def grouped_factor(x: jax.Array, group_sizes: jax.Array, w: jax.Array) -> jax.Array:
    """Rows of x float32 [m, k], sorted by expert, times the transposed matrix of their expert: float32 [m, n]."""
    return xla.grouped(x, group_sizes, Matrix.of(w, "F32"), dispatch.target())


def _kept(x: jax.Array, group_sizes: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    return grouped_factor(x, group_sizes, w), (x, group_sizes, w)


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    x, group_sizes, w = kept
    dx = xla.grouped(dy, group_sizes, Matrix.of(w, "F32"), dispatch.target(), transposed=True)
    return dx, None, _outer(dy, x, group_sizes)


def _outer(dy: jax.Array, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For each expert the sum over its rows of dy x^T: [m, n], [m, k] -> float32 [E, n, k], a tile of rows at a time."""
    rows = xla.tile_rows(x.shape[0], group_sizes.shape[0])
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // rows)
    tile_ends = jnp.cumsum(tiles)
    dy, x = (jnp.pad(part, ((0, rows), (0, 0))) for part in (dy, x))

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        expert = jnp.sum(tile_ends <= i, dtype=jnp.int32)
        start = ends[expert] - group_sizes[expert] + (i - tile_ends[expert] + tiles[expert]) * rows
        mine = (start + jnp.arange(rows) < ends[expert])[:, None]
        left, right = (lax.dynamic_slice_in_dim(part, start, rows) for part in (dy, x))
        part = jnp.einsum("mn,mk->nk", jnp.where(mine, left, 0.0), right, precision=lax.Precision.HIGHEST)
        return dw.at[expert].add(part)

    shape = group_sizes.shape[0], dy.shape[1], x.shape[1]
    return lax.fori_loop(0, tile_ends[-1], body, jnp.zeros(shape, jnp.float32))


grouped_factor.defvjp(_kept, _backward)


class ExpertAdapters(NamedTuple):
    """The pairs of the three products of E experts; None: without one."""

    gate: Pair | None
    up: Pair | None
    down: Pair | None
