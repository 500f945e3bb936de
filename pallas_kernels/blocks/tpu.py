"""Layout "tpu": planes with the matrix's rows on the lanes, so that a vector register holds one k of 128 outputs.

Every plane of a matrix [n, k] is [k', n'], n' being n rounded up to 128, and consists of whole runs of 256 along k. A weight is
`scale * value - minimum`; the contents of the planes follow from a few properties of its format (`Packing`):

    q   uint8 [k/2]    the low four bits of two codes: byte r of a run has k r below and k 128 + r above.
        int8 [k]       where codes have eight bits
    h   uint8 [k/8]    the fifth bit: bit j of byte r of a run belongs to k 32 j + r
        uint8 [k/4]    bits 4 and 5: in byte r of a run, bits 0-1 of k r, 2-3 of 128 + r, 4-5 of 64 + r, 6-7 of 192 + r
    s   uint8 or int8  the integer scale of each group (then the integer minima); the exponents of MXFP4
    d   int16          half-precision scales as bits (then those of the minima): float16 cannot be loaded on a TPU

A half run at the end (k = 128 mod 256) has 64 bytes of q, k r with k 64 + r, and 32 of h with bits 0..3 alone. Rows that are
not a multiple of 128 are filled up with blocks of zeros, which are weights of zero. s and d are filled up to a multiple of 8
rows: with other counts XLA would copy whole stacks into another layout before a kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import FORMATS, fp4, iq4
from .format import half_to_float32, split, spread, take
from .q4_k import group_scales

NAME = "tpu"
AXES = 1, 0
LANES = 128
RUN = 256
_MOST = 1.05  # limit of the bytes, relative to the file's
_TILE = 256  # rows that are packed at a time

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How one format's weights are stored and what they mean.

    bits: of a code. codebook: "iq4" or "fp4" if codes are looked up. offset: is then subtracted from the value. group: weights
    that share a scale. scale: "half" (a half per group), "integer" (an integer per group, and a half per 256 weights) or
    "power" (2^(byte - 128)). minima: "half" and "integer" formats may have as many of them, subtracted (half: added). read:
    blocks uint8 [n, blocks, bytes] -> codes uint8 [n, k], parts of s and parts of d, each [n, blocks, any].
    """

    bits: int
    scale: str
    read: Callable[[jax.Array], tuple[jax.Array, Arrays, Arrays]]
    group: int = 32
    minima: bool = False
    offset: int = 0
    codebook: str = ""


def _bytes(blocks: jax.Array, start: int, count: int) -> jax.Array:
    return blocks[..., start : start + count]


def _half(blocks: jax.Array, start: int) -> jax.Array:
    low, high = (_bytes(blocks, start + i, 1).astype(jnp.uint16) for i in range(2))
    return lax.bitcast_convert_type(low | (high << 8), jnp.int16)


def _halves(blocks: jax.Array, start: int) -> jax.Array:
    """Codes of 4 bits, 16 bytes for 32 weights: the low nibbles come first."""
    q = _bytes(blocks, start, 16)
    return jnp.concatenate([q & 15, q >> 4], -1)


def _pairs(blocks: jax.Array, start: int, width: int) -> jax.Array:
    """Codes of 4 bits, 128 bytes for 256 weights: the low nibbles of `width` bytes, then their high ones."""
    q = _bytes(blocks, start, 128).reshape(*blocks.shape[:-1], 128 // width, 1, width)
    return jnp.concatenate([q & 15, q >> 4], -2).reshape(*blocks.shape[:-1], 256)


def _fifth(blocks: jax.Array, start: int) -> jax.Array:
    """Bit j of a 32-bit word, as bit 4 of code j."""
    bits = spread(_bytes(blocks, start, 4).astype(jnp.int32), 8, 1).astype(jnp.uint8)
    return bits.reshape(*blocks.shape[:-1], 32) << 4


def _k_scales(blocks: jax.Array) -> Arrays:
    scales, minima = zip(*(group_scales(blocks, group) for group in range(8)), strict=True)
    return jnp.concatenate(scales, -1).astype(jnp.uint8), jnp.concatenate(minima, -1).astype(jnp.uint8)


def _q4_0(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _halves(blocks, 2), (), (_half(blocks, 0),)


def _q4_1(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _halves(blocks, 4), (), (_half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _halves(blocks, 6) | _fifth(blocks, 2), (), (_half(blocks, 0),)


def _q5_1(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _halves(blocks, 8) | _fifth(blocks, 4), (), (_half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _bytes(blocks, 2, 32), (), (_half(blocks, 0),)


def _q4_k(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _pairs(blocks, 16, 32), _k_scales(blocks), (_half(blocks, 0), _half(blocks, 2))


def _q5_k(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    fifth = (_bytes(blocks, 16, 32)[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
    codes = _pairs(blocks, 48, 32) | (fifth.reshape(*blocks.shape[:-1], 256) << 4)
    return codes, _k_scales(blocks), (_half(blocks, 0), _half(blocks, 2))


def _q6_k(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    high = _bytes(blocks, 128, 64).reshape(*blocks.shape[:-1], 2, 1, 32)
    high = (high >> (2 * jnp.arange(4, dtype=jnp.uint8))[:, None]) & 3
    codes = _pairs(blocks, 0, 64) | (high.reshape(*blocks.shape[:-1], 256) << 4)
    return codes, (lax.bitcast_convert_type(_bytes(blocks, 192, 16), jnp.int8),), (_half(blocks, 208),)


def _iq4_nl(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    return _halves(blocks, 2), (), (_half(blocks, 0),)


def _iq4_xs(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    low = spread(take(blocks, 4, 4), 2, 4).reshape(*blocks.shape[:-1], 8)
    high = spread(take(blocks, 2, 2), 4, 2).reshape(*blocks.shape[:-1], 8)
    scale = ((low | (high << 4)) - 32).astype(jnp.int8)
    groups = _bytes(blocks, 8, 128).reshape(*blocks.shape[:-1], 8, 16)
    return _halves(groups, 0).reshape(*blocks.shape[:-1], 256), (scale,), (_half(blocks, 0),)


def _mxfp4(blocks: jax.Array) -> tuple[jax.Array, Arrays, Arrays]:
    codes = _halves(blocks, 1)
    return jnp.where(codes == 8, 0, codes), (_bytes(blocks, 0, 1),), ()  # ggml has one zero


PACKINGS = {
    "Q4_0": Packing(4, "half", _q4_0, offset=8),
    "Q4_1": Packing(4, "half", _q4_1, minima=True),
    "Q5_0": Packing(5, "half", _q5_0, offset=16),
    "Q5_1": Packing(5, "half", _q5_1, minima=True),
    "Q8_0": Packing(8, "half", _q8_0),
    "Q4_K": Packing(4, "integer", _q4_k, minima=True),
    "Q5_K": Packing(5, "integer", _q5_k, minima=True),
    "Q6_K": Packing(6, "integer", _q6_k, group=16, offset=32),
    "IQ4_NL": Packing(4, "half", _iq4_nl, codebook="iq4"),
    "IQ4_XS": Packing(4, "integer", _iq4_xs, codebook="iq4"),
    "MXFP4": Packing(4, "power", _mxfp4, codebook="fp4"),
}


def plane_names(format: str) -> str:
    """The letters of the planes that a format has, in their order."""
    packing = PACKINGS[format]
    return "q" + ("h" if packing.bits in (5, 6) else "") + {"half": "d", "integer": "sd", "power": "s"}[packing.scale]


def fits(format: str, n: int, k: int) -> str | None:
    """None if a matrix [n, k] can be packed, else the reason in words."""
    if format not in PACKINGS:
        return f"{format} has no TPU memory layout"
    if k % FORMATS[format].block_size:
        return f"rows of {k} weights are not a multiple of {FORMATS[format].block_size}"
    size = sum(math.prod(plane.shape) * plane.dtype.itemsize for plane in plane_shapes(format, n, k))
    stored = n * FORMATS[format].row_bytes(k)
    return f"[{n}, {k}] would take {size} bytes for the file's {stored}" if size > _MOST * stored else None


def unit(format: str) -> int:
    """How many weights of a row can be packed without the rest of it."""
    return max(FORMATS[format].block_size, LANES)


def filled(k: int) -> int:
    """How many weights of a row planes have for k."""
    return -(-k // LANES) * LANES


def plane_shapes(format: str, n: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the planes of one matrix."""
    stored = jax.ShapeDtypeStruct((n, FORMATS[format].row_bytes(k)), jnp.uint8)
    return jax.eval_shape(lambda blocks: pack(blocks, format), stored)


def pack(stored: jax.Array, format: str) -> Arrays:
    """Planes of the blocks uint8 [n, bytes] of one matrix. Lanes beyond n are zero.

    It works in tiles of rows, because XLA takes minutes to compile the transposition of a whole large matrix, and as much
    memory again.
    """
    known = FORMATS[format]
    k = stored.shape[1] // known.block_bytes * known.block_size
    stored = jnp.pad(stored, ((0, -stored.shape[0] % LANES), (0, known.row_bytes(filled(k)) - stored.shape[1])))
    n, width = stored.shape
    if n <= _TILE:
        return _pack_tile(stored, format)
    tile = jax.eval_shape(lambda part: _pack_tile(part, format), jax.ShapeDtypeStruct((_TILE, width), jnp.uint8))

    def body(i: Any, planes: Any) -> Any:
        at = jnp.minimum(i * _TILE, n - _TILE)  # the last tile overlaps the one before and writes the same bytes
        parts = _pack_tile(lax.dynamic_slice(stored, (at, 0), (_TILE, width)), format)
        return tuple(lax.dynamic_update_slice(plane, part, (0, at)) for plane, part in zip(planes, parts, strict=True))

    return lax.fori_loop(0, -(-n // _TILE), body, tuple(jnp.zeros((plane.shape[0], n), plane.dtype) for plane in tile))


def _pack_tile(stored: jax.Array, format: str) -> Arrays:
    packing = PACKINGS[format]
    blocks = split(stored, FORMATS[format].block_bytes)
    codes, scales, halves = packing.read(blocks)
    codes = codes.reshape(blocks.shape[0], -1).T
    if packing.bits == 8:
        planes = [lax.bitcast_convert_type(codes, jnp.int8)]
    else:
        planes = [_pack(codes & 15, LOW)]
        if packing.bits > 4:
            planes.append(_pack(codes >> 4, HIGH[packing.bits]))
    for parts in (scales, halves):
        if parts:
            plane = jnp.concatenate([part.reshape(part.shape[0], -1).T for part in parts])
            planes.append(jnp.pad(plane, ((0, -plane.shape[0] % 8), (0, 0))))
    return tuple(planes)


# Where the pieces of a run lie in a byte: (bits of a code, rows of a plane for each run, shift of each piece).
LOW = (4, 128, (0, 4))
HIGH = {5: (1, 32, tuple(range(8))), 6: (2, 64, (0, 4, 2, 6))}


def _tail(rows: int) -> int:
    """Rows of a plane for a half run: nibbles pair up within it, fifth bits keep their rows."""
    return max(rows // 2, 32)


def _pack(codes: jax.Array, field: tuple[int, int, tuple[int, ...]]) -> jax.Array:
    """uint8 codes [k, n] -> bytes [k', n]."""
    _, rows, shifts = field
    n = codes.shape[1]
    whole = codes.shape[0] // RUN * RUN

    def merge(pieces: Any) -> jax.Array:  # [any, pieces, rows, n]
        return sum(pieces[:, i] << shifts[i] for i in range(pieces.shape[1])).astype(jnp.uint8).reshape(-1, n)

    runs, tail = codes[:whole].reshape(-1, len(shifts), rows, n), codes[whole:]
    return jnp.concatenate([merge(runs), merge(tail.reshape(1, -1, _tail(rows), n))]) if tail.size else merge(runs)


def _unpack(packed: jax.Array, field: tuple[int, int, tuple[int, ...]], k: int) -> jax.Array:
    """The inverse: int32 codes [k, n]."""
    bits, rows, shifts = field
    n = packed.shape[1]
    whole = k // RUN * rows

    def pieces(part: jax.Array) -> jax.Array:  # [any, rows, n]
        return jnp.stack([(part >> shift) & ((1 << bits) - 1) for shift in shifts], 1).reshape(-1, n)

    packed = packed.astype(jnp.int32)
    return jnp.concatenate([pieces(packed[:whole].reshape(-1, rows, n)), pieces(packed[whole:][None])])[:k]


def decode(planes: Arrays, format: str, n: int, k: int) -> jax.Array:
    """The weights, float32 [n, k], bit-equal to those of the blocks."""
    packing, whole = PACKINGS[format], filled(k)
    parts = dict(zip(plane_names(format), (plane[:, :n] for plane in planes), strict=True))
    if packing.bits == 8:
        values = parts["q"].astype(jnp.int32)
    else:
        values = _unpack(parts["q"], LOW, whole)
        if packing.bits > 4:
            values |= _unpack(parts["h"], HIGH[packing.bits], whole) << 4
    if packing.codebook:
        values = {"iq4": iq4.level, "fp4": fp4.value_of}[packing.codebook](values)
    values -= packing.offset
    values = values.reshape(-1, packing.group, n)
    groups = values.shape[0]
    if packing.scale == "power":
        return fp4.times_power(values, parts["s"][:groups, None].astype(jnp.int32)).reshape(whole, n)[:k].T

    halves = half_to_float32(parts["d"].astype(jnp.int32))
    count = groups if packing.scale == "half" else whole // RUN
    factors = [halves[i * count : (i + 1) * count] for i in range(1 + packing.minima)]
    if packing.scale == "integer":
        integers = parts["s"].astype(jnp.float32)
        factors = [
            jnp.repeat(half, groups // count, 0) * integers[i * groups : (i + 1) * groups] for i, half in enumerate(factors)
        ]
    weights = values.astype(jnp.float32) * factors[0][:, None]
    if packing.minima:
        minimum = factors[1][:, None]
        weights = weights + minimum if packing.scale == "half" else weights - minimum
    return weights.reshape(whole, n)[:k].T


def rows(planes: Arrays, index: Arrays, start: jax.Array | int, count: int) -> Arrays:
    """The planes of rows start .. start + count - 1 of the matrix at `index` of the stacks."""

    def part(plane: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + (plane.shape[-2], count)
        at = (*index, jnp.zeros((), jnp.int32), jnp.asarray(start, jnp.int32))
        return lax.dynamic_slice(plane, at, sizes).reshape(sizes[-2:])

    return tuple(part(plane) for plane in planes)


def gather(planes: Arrays, ids: jax.Array) -> Arrays:
    """The planes of the rows `ids` int32 [t] of one matrix. Row by row, because XLA would copy the planes into another layout
    for `jnp.take`."""

    def row(i: Any) -> Any:
        return tuple(lax.dynamic_slice(plane, (0, i), (plane.shape[0], 1))[:, 0] for plane in planes)

    return tuple(part.T for part in lax.map(row, ids))
