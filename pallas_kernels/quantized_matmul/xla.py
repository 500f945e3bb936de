"""Compressed matmul in plain XLA: unpack a tile of rows, multiply it, take the next.

A tile is at most 8 MiB unpacked, so the temporaries of a program do not grow with its matrices. XLA gives every row of a
product the same bits for any number of rows from two up (a single row is computed differently on CPU), hence the padding to
two.

Inlined jits do not change the program; with them, Python traces each shape only once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.layouts import unpack_rows
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Target
from pallas_kernels.reductions import silu

TILE_BYTES = 8 << 20
_LIBRARY_ROWS = 2


def matmuls(x: jax.Array, matrices: Sequence[Matrix], target: Target) -> list[jax.Array]:
    """[m, k] · [n_i, k]ᵀ -> float32 [m, n_i], one matrix after the other."""
    return [matmul(x, matrix, target) for matrix in matrices]


def swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: Target) -> jax.Array:
    """silu(x · gateᵀ) * (x · upᵀ): [m, n] in the dtype of x."""
    return (silu(matmul(x, gate, target)) * matmul(x, up, target)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="target", inline=True)
def matmul(x: jax.Array, matrix: Matrix, target: Target) -> jax.Array:
    """[m, k] · [n, k]ᵀ -> float32 [m, n]."""
    (m, k), n = x.shape, matrix.rows
    x, dtype = _library_operand(x, target)
    rows, tiles = _tiling(n, k)

    def tile(start: jax.Array | int) -> jax.Array:
        return _dot(x, unpack_rows(matrix, start, rows).astype(dtype), contract=1)

    if tiles == 1:
        return tile(0)[:m]

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, n - rows)  # the last tile overlaps the one before and writes the same values
        return lax.dynamic_update_slice(y, tile(start), (0, start))

    return lax.fori_loop(0, tiles, body, jnp.zeros((x.shape[0], n), jnp.float32))[:m]


@functools.partial(jax.jit, static_argnames="target", inline=True)
def matmul_transposed(dy: jax.Array, matrix: Matrix, target: Target) -> jax.Array:
    """[m, n] · [n, k] -> float32 [m, k]: tiles of rows of the matrix are summed in order."""
    (m, n), k = dy.shape, matrix.columns
    dy, dtype = _library_operand(dy, target)
    rows, tiles = _tiling(n, k)

    def body(i: jax.Array, dx: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, n - rows)
        fresh = start + jnp.arange(rows) >= i * rows  # rows that the tile before did not have
        part = jnp.where(fresh, lax.dynamic_slice(dy, (0, start), (dy.shape[0], rows)), 0)
        return dx + _dot(part, unpack_rows(matrix, start, rows).astype(dtype), contract=0)

    return lax.fori_loop(0, tiles, body, jnp.zeros((dy.shape[0], k), jnp.float32))[:m]


def _tiling(n: int, k: int) -> tuple[int, int]:
    """Rows per tile, and the number of tiles."""
    rows = min(n, max(8, TILE_BYTES // (4 * k)))
    return rows, math.ceil(n / rows)


def _library_operand(x: jax.Array, target: Target) -> tuple[jax.Array, jnp.dtype]:
    """x in the dtype of the product: half precision does not have a fast one on CPU, and a single row gets other bits there
    than two."""
    if target.platform != "cpu":
        return x, x.dtype
    if x.dtype == jnp.float16:
        x = x.astype(jnp.float32)
    missing = max(0, _LIBRARY_ROWS - x.shape[0])
    return jnp.pad(x, ((0, missing), (0, 0))), x.dtype


def _dot(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)
