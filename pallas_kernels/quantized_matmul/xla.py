"""Compressed matmul in plain XLA: unpack a tile of rows, multiply it, go on.

A tile is at most 8 MiB unpacked, so the temporaries of a program do not grow with its matrices. XLA gives every row of a
product the same bits for any number of rows from two up (one row takes another path on CPU), hence the padding to two.

Inlined jits leave the program as it is; they only let Python trace each shape once.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BlockFormat

TILE_BYTES = 8 << 20
_LIBRARY_ROWS = 2


@functools.partial(jax.jit, static_argnames="format", inline=True)
def matmul(x: jax.Array, stored: jax.Array, index: tuple[jax.Array, ...], format: BlockFormat) -> jax.Array:
    """[m, k] · [n, k]ᵀ -> float32 [m, n]."""
    m, k = x.shape
    n = stored.shape[-2]
    x, dtype = _library_operand(x)
    rows, tiles = _tiling(n, k)

    def tile(start):
        return _dot(x, _unpack(stored, index, start, rows, format, dtype), contract=1)

    if tiles == 1:
        return tile(0)[:m]

    def body(i, y):
        start = jnp.minimum(i * rows, n - rows)  # the last tile overlaps the one before: the same values again
        return lax.dynamic_update_slice(y, tile(start), (0, start))

    return lax.fori_loop(0, tiles, body, jnp.zeros((x.shape[0], n), jnp.float32))[:m]


@functools.partial(jax.jit, static_argnames="format", inline=True)
def matmul_transposed(dy: jax.Array, stored: jax.Array, index: tuple[jax.Array, ...], format: BlockFormat) -> jax.Array:
    """[m, n] · [n, k] -> float32 [m, k]: tiles of rows of the matrix are summed in order."""
    m, n = dy.shape
    k = stored.shape[-1] * format.storage.itemsize // format.block_bytes * format.block_size
    dy, dtype = _library_operand(dy)
    rows, tiles = _tiling(n, k)

    def body(i, dx):
        start = jnp.minimum(i * rows, n - rows)
        fresh = start + jnp.arange(rows) >= i * rows  # rows that the tile before has not had
        part = jnp.where(fresh, lax.dynamic_slice(dy, (0, start), (dy.shape[0], rows)), 0)
        return dx + _dot(part, _unpack(stored, index, start, rows, format, dtype), contract=0)

    return lax.fori_loop(0, tiles, body, jnp.zeros((dy.shape[0], k), jnp.float32))[:m]


def _tiling(n: int, k: int) -> tuple[int, int]:
    """Rows a tile and the number of tiles."""
    rows = min(n, max(8, TILE_BYTES // (4 * k)))
    return rows, math.ceil(n / rows)


def _library_operand(x: jax.Array) -> tuple[jax.Array, jnp.dtype]:
    """x with at least two rows, in the dtype of the product. Half precision has no fast product on CPU."""
    if x.dtype == jnp.float16 and jax.default_backend() == "cpu":
        x = x.astype(jnp.float32)
    missing = max(0, _LIBRARY_ROWS - x.shape[0])
    return jnp.pad(x, ((0, missing), (0, 0))), x.dtype


def _unpack(stored, index, start, rows, format: BlockFormat, dtype) -> jax.Array:
    """Rows [start, start + rows) of the matrix at `index`, unpacked: [rows, k] in `dtype`."""
    zero = jnp.zeros((), jnp.int32)
    sizes = (1,) * len(index) + (rows, stored.shape[-1])
    raw = lax.dynamic_slice(stored, (*index, jnp.asarray(start, jnp.int32), zero), sizes)
    return format.decode(raw.reshape(sizes[-2:])).astype(dtype)


def _dot(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)
