"""Converts float32 weights to ggml blocks, the inverse of `unpack` except for rounding.

`quantize(values, format)` cuts the values into chunks of blocks; a jitted function of one shape finds the scales (scales.py)
and writes the bytes, and one thread per core feeds it. Inside, codes are [weights of a block, blocks] with blocks on the
contiguous axis, so that each byte of a block is a row and packing is plain vector arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import FORMATS, scales

__all__ = ["QUANTIZED", "quantize"]

_CHUNK = 1 << 17  # weights that a thread handles at a time: its temporaries stay in the cache


def _halves(*halves: jax.Array) -> list[jax.Array]:
    """float16 [blocks] each -> their bytes, uint8 [2, blocks] each."""
    bits = [jax.lax.bitcast_convert_type(half, jnp.uint16) for half in halves]
    return [jnp.stack([part & 255, part >> 8]).astype(jnp.uint8) for part in bits]


def _natural(codes: jax.Array) -> jax.Array:
    """[n, groups, blocks] -> [weights in their order, blocks]."""
    return jnp.swapaxes(codes, 0, 1).reshape(-1, codes.shape[2])


def _merged(fields: jax.Array, bits: int) -> jax.Array:
    """uint8 [any, k, m, blocks] -> bytes [any * m, blocks], field k at bit `bits * k`."""
    parts = [fields[:, k] << (bits * k) for k in range(fields.shape[1])]
    return functools.reduce(jnp.bitwise_or, parts).reshape(-1, fields.shape[3])


def _runs(codes: jax.Array, *shape: int) -> jax.Array:
    return codes.reshape(*shape, codes.shape[-1])


def _bits(codes: jax.Array) -> jax.Array:
    """One bit of each of 8 m codes -> m bytes, the lowest bit first."""
    return _merged(jnp.swapaxes(_runs(codes, 1, -1, 8), 1, 2), 1)


def _symmetric(x: jax.Array, grid: Any, with_fifth: bool = False) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, d = scales.single(x, grid)
    codes = _natural(codes)
    high = [_bits(codes >> 4)] if with_fifth else []
    return [*_halves(d), *high, _merged(_runs(codes & 15, 1, 2, 16), 4)], (d,)


def _q8_0(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, d = scales.single(x, scales.EIGHT)
    return [*_halves(d), _natural(codes) + jnp.uint8(129)], (d,)  # code - 127, in eight bits


def _affine(x: jax.Array, top: int) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, d, m = scales.single_affine(x, top)
    codes = _natural(codes)
    high = [_bits(codes >> 4)] if top > 15 else []
    return [*_halves(d, m), *high, _merged(_runs(codes & 15, 1, 2, 16), 4)], (d, m)


def _q2_k(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, scale, offset, d, dmin = scales.double_affine(x, 3, 15)
    groups = (scale | (offset << 4)).astype(jnp.uint8)
    return [groups, _merged(_runs(_natural(codes), 2, 4, 32), 2), *_halves(d, dmin)], (d, dmin)


def _q3_k(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, scale, d = scales.double(x, scales.THREE, -32, 31)
    codes = _natural(codes)
    scale = (scale + 32).astype(jnp.uint8)
    groups = [_merged(_runs(scale & 15, 1, 2, 8), 4), _merged(_runs(scale >> 4, 1, 4, 4), 2)]
    return [_merged(_runs(codes >> 2, 1, 8, 32), 1), _merged(_runs(codes & 3, 2, 4, 32), 2), *groups, *_halves(d)], (d,)


def _k(x: jax.Array, top: int) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Q4_K and Q5_K."""
    codes, scale, offset, d, dmin = scales.double_affine(x, top, 63)
    codes = _natural(codes)
    scale, offset = scale.astype(jnp.uint8), offset.astype(jnp.uint8)
    low, high = slice(0, 4), slice(4, 8)
    groups = [part[low] | (part[high] >> 4) << 6 for part in (scale, offset)]
    groups.append((scale[high] & 15) | (offset[high] & 15) << 4)
    fifth = [_merged(_runs(codes >> 4, 1, 8, 32), 1)] if top > 15 else []
    return [*_halves(d, dmin), *groups, *fifth, _merged(_runs(codes & 15, 4, 2, 32), 4)], (d, dmin)


def _q6_k(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, scale, d = scales.double(x, scales.SIX, -128, 127)
    runs = _runs(_natural(codes), 2, 4, 32)
    low = jnp.concatenate([(runs[:, k] & 15) | (runs[:, k + 2] & 15) << 4 for k in range(2)], 1)
    return [low.reshape(128, -1), _merged(runs >> 4, 2), scale.astype(jnp.int8).view(jnp.uint8), *_halves(d)], (d,)


def _iq4_xs(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    codes, scale, d = scales.double(x, scales.UNEVEN, -32, 31)
    scale = (scale + 32).astype(jnp.uint8)
    high = _merged(jnp.swapaxes(_runs(scale >> 4, 1, 2, 4), 1, 2), 2)
    low = _merged(jnp.swapaxes(_runs(scale & 15, 1, 4, 2), 1, 2), 4)
    return [*_halves(d), high, low, _merged(_runs(_natural(codes), 8, 2, 16), 4)], (d,)


Encoder = Callable[[jax.Array], tuple[list[jax.Array], Iterable[jax.Array]]]
# By format: the number of weights that share a scale, and the function from x [that number, groups, blocks] to the rows of
# bytes in order and the halves among them.
_ENCODERS: dict[str, tuple[int, Encoder]] = {
    "Q4_0": (32, functools.partial(_symmetric, grid=scales.FOUR)),
    "Q4_1": (32, functools.partial(_affine, top=15)),
    "Q5_0": (32, functools.partial(_symmetric, grid=scales.FIVE, with_fifth=True)),
    "Q5_1": (32, functools.partial(_affine, top=31)),
    "Q8_0": (32, _q8_0),
    "Q2_K": (16, _q2_k),
    "Q3_K": (16, _q3_k),
    "Q4_K": (32, functools.partial(_k, top=15)),
    "Q5_K": (32, functools.partial(_k, top=31)),
    "Q6_K": (16, _q6_k),
    "IQ4_NL": (32, functools.partial(_symmetric, grid=scales.UNEVEN)),
    "IQ4_XS": (32, _iq4_xs),
}
QUANTIZED = tuple(_ENCODERS)


@functools.partial(jax.jit, static_argnames="format")
def _encode(values: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    """float32 [blocks, weights] -> uint8 [blocks, bytes], and whether everything is finite."""
    group, encoder = _ENCODERS[format]
    x = jnp.moveaxis(values.reshape(values.shape[0], -1, group), 0, 2)
    rows, halves = encoder(jnp.swapaxes(x, 0, 1))
    sound = jnp.isfinite(values).all()
    for half in halves:
        sound &= jnp.isfinite(half).all()
    return jnp.concatenate(rows).T, sound


def quantize(values: np.ndarray, format: str) -> np.ndarray:
    """Blocks of `format`, a member of QUANTIZED, that approximate the values.

    values: float32 [..., columns], columns a multiple of the block. Returns uint8 [..., bytes], as `unpack` takes it.
    ValueError: another format or shape, a value that is not finite or too large for a half-precision scale.
    """
    if format not in _ENCODERS:
        raise ValueError(f"{format!r} is not a format that weights can be quantized to; these are {', '.join(QUANTIZED)}")
    known = FORMATS[format]
    if values.dtype != np.float32:
        raise ValueError(f"{format}: quantize takes float32 values, not {values.dtype}")
    shape = (*values.shape[:-1], known.row_bytes(values.shape[-1]))
    blocks = values.reshape(-1, known.block_size)
    out = np.empty((blocks.shape[0], known.block_bytes), np.uint8)
    count = _CHUNK // known.block_size
    _each(lambda start: _encode_chunk(blocks, out, start, count, format), range(0, len(blocks), count))
    return out.reshape(shape)


def on_host() -> contextlib.AbstractContextManager[object]:
    """Computes on the CPU, if JAX has it in addition to the accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return contextlib.nullcontext()


def _encode_chunk(blocks: np.ndarray, out: np.ndarray, start: int, count: int, format: str) -> None:
    part = blocks[start : start + count]
    if len(part) < count:  # so that all chunks have the same shape, compiled once
        part = np.concatenate([part, np.zeros((count - len(part), part.shape[1]), np.float32)])
    with on_host():
        encoded, sound = _encode(part, format)
    if not sound:
        finite = np.isfinite(part).all()
        raise ValueError(
            f"values up to {np.abs(part).max():.3g} are too large for the half-precision scales of {format}"
            if finite
            else "holds values that are not finite (NaN or infinity)"
        )
    out[start : start + count] = np.asarray(encoded)[: len(out) - start]


def _each(work: Callable[[int], None], starts: range) -> None:
    """`work` for every start, on all cores."""
    if len(starts) == 1:
        work(starts[0])
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, starts):
            pass
