"""Layout "gpu": planes of 16- and 32-bit words whose order is the one in which tensor cores hold a matrix in registers.

A matrix [n, k] keeps one row after the other. A row is cut into units of 256 weights (128 or 64 if k requires it), a unit of 64
G weights into G groups of 64, a group into four pieces of 16. Four weights with the same place in the four pieces of a group
share a word of the plane of nibbles, piece p at bits 4 p. The words of a unit are ordered so that, if G is 4, one thread of an
m16n8k16 operand (it holds slots 2 j, 2 j + 1, 2 j + 8, 2 j + 9 of every sixteen, j = lane % 4) gets weights of a single group
and unpacks one set of scales for 64 weights. `ordered` is that order, and the kernels take activations in it.

Planes of a format, in this order; a row's width is given in weights:

    q   uint16 [n, k/4]   the low four bits of four codes per word
        uint16 [n, k/2]   Q8_0: two codes per word, pieces 0 and 1 of a unit's words, then pieces 2 and 3
    h   uint16 [n, k/16]  fifth bits: word i of a unit's 4 G words serves its words i + 4 G c, c = 0..3, at bits 4 c + p
        uint16 [n, k/8]   bits 4 and 5: word i of 32 serves words i + 32 c, c = 0..1, at bits 8 c + 2 p
    s   scales, a group of 64 weights having two (a: pieces 0 and 1, b: pieces 2 and 3), of Q6_K four:
        uint32 [n, k/64]  halves: half d of a | of b << 16
        uint32 [n, k/32]  pairs: half d | half m << 16, for a, then for b
        uint32 [n, k/64]  K: per 256 weights four words. Bytes (scale a, offset a, scale b, offset b): words 0 and 1 have
                          their low four bits, group 2 w in the low and 2 w + 1 in the high halves of the bytes of word w,
                          word 2 bits 4 and 5, of group g at bits 2 g of each byte; word 3: half d | half dmin << 16
        uint32 [n, k/64]  Q6_K: byte p is the scale of piece p, plus 128; and d  uint16 [n, k/256]
        uint32 [n, k/128] IQ4_XS: low four bits of the eight scales; half d | their two high bits << 16
        uint16 [n, k/64]  MXFP4: exponent of a | of b << 8

Codes are the unsigned ones of the file; Q8_0's and Q6_K's scales are stored plus 128. The bytes are exactly the file's.
All words have 16 or 32 bits because Triton addresses arrays of bytes beyond 2 GiB wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from . import FORMATS, fp4, iq4
from .format import half_to_float32, split, spread
from .q4_k import group_scales

NAME = "gpu"
AXES = 0, 1
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How one format is stored in the planes.

    bits: of a code. scale: the form of s. unit: k is a multiple of it. offset: subtracted from codes (Q4_0: 8). levels: what
    the codes stand for, if not for themselves. read: blocks uint8 [n, blocks, bytes] -> codes uint8 [n, k] in natural order and
    the planes of scales [n, any].
    """

    bits: int
    scale: str
    unit: int
    read: Callable[[jax.Array], tuple[jax.Array, Arrays]]
    offset: int = 0
    levels: tuple[int, ...] | None = None


# --- order ---------------------------------------------------------------------------------------------------------


def groups_of(k: int) -> int:
    """G, the groups of 64 weights in a unit."""
    return 4 if k % 256 == 0 else 2 if k % 128 == 0 else 1


def ordered(values: jax.Array) -> jax.Array:
    """[..., k] in natural order -> [..., k] in the order of the planes: unit, piece, place."""
    k = values.shape[-1]
    g = groups_of(k)
    parts = values.reshape(*values.shape[:-1], k // (64 * g), g, 4, g, 4 // g, 2, 2)  # unit, group, piece, t, r, h, b
    return jnp.moveaxis(parts, (-5, -4, -2, -6, -3), (-6, -5, -4, -3, -2)).reshape(values.shape)


def place_of(column: jax.Array, k: int) -> jax.Array:
    """Where `ordered` puts a column of a row of k, int32, by arithmetic alone (kernels store with it)."""
    g = groups_of(k)
    unit, group, piece, i = column // (64 * g), column // 64 % g, column // 16 % 4, column % 16
    r, t = i // 4 % (4 // g), i // (16 // g)
    place = (t * 2 + i // 2 % 2) * 8 + (group * (4 // g) + r) * 2 + i % 2
    return (unit * 4 + piece) * 16 * g + place


def _natural(values: jax.Array) -> jax.Array:
    """The inverse of `ordered`."""
    k = values.shape[-1]
    g = groups_of(k)
    parts = values.reshape(*values.shape[:-1], k // (64 * g), 4, g, 2, g, 4 // g, 2)  # unit, piece, t, h, group, r, b
    return jnp.moveaxis(parts, (-3, -6, -5, -2, -4), (-6, -5, -4, -3, -2)).reshape(values.shape)


# --- reading blocks ------------------------------------------------------------------------------------------------


def _bytes(blocks: jax.Array, start: int, count: int = 1) -> jax.Array:
    return blocks[..., start : start + count]


def _rows(parts: jax.Array) -> jax.Array:
    return parts.reshape(parts.shape[0], -1)


def _words(octets: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Little-endian words of the last axis."""
    return lax.bitcast_convert_type(octets.reshape(*octets.shape[:-1], -1, jnp.dtype(dtype).itemsize), dtype)


def _nibbles(blocks: jax.Array, start: int, count: int, width: int = 16) -> jax.Array:
    """Codes of `count` bytes in runs of `width`: the low nibbles of a run, then its high ones."""
    octets = _bytes(blocks, start, count).reshape(*blocks.shape[:-1], count // width, 1, width)
    return _rows(jnp.concatenate([octets & 15, octets >> 4], -2))


def _fifths(blocks: jax.Array, start: int) -> jax.Array:
    """Bit j of a 32-bit word, as bit 4 of code j."""
    bits = (_bytes(blocks, start, 4)[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return _rows(bits << 4)


def _halves(blocks: jax.Array, start: int) -> jax.Array:
    """One half per block of 32, two blocks per word."""
    return _words(_rows(_bytes(blocks, start, 2)), jnp.uint32)


def _pairs(blocks: jax.Array) -> jax.Array:
    return _words(_rows(_bytes(blocks, 0, 4)), jnp.uint32)


def _k_scales(blocks: jax.Array) -> jax.Array:
    fields = [field for g in range(8) for field in group_scales(blocks, g)]
    octets = jnp.concatenate(fields, -1).astype(jnp.uint8).reshape(*blocks.shape[:2], 2, 2, 4)  # w, half, byte
    low = octets & 15
    low = low[..., 0, :] | (low[..., 1, :] << 4)
    high = (octets >> 4).reshape(*blocks.shape[:2], 4, 4)
    high = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    return _words(_rows(jnp.concatenate([_rows3(low), high, _bytes(blocks, 0, 4)], -1)), jnp.uint32)


def _rows3(parts: jax.Array) -> jax.Array:
    return parts.reshape(*parts.shape[:2], -1)


def _q4_0(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 2, 16), (_halves(blocks, 0),)


def _q4_1(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 4, 16), (_pairs(blocks),)


def _q5_0(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 6, 16) | _fifths(blocks, 2), (_halves(blocks, 0),)


def _q5_1(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 8, 16) | _fifths(blocks, 4), (_pairs(blocks),)


def _q8_0(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _rows(_bytes(blocks, 2, 32)) ^ 128, (_halves(blocks, 0),)


def _q4_k(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 16, 128, 32), (_k_scales(blocks),)


def _q5_k(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    fifth = (_bytes(blocks, 16, 32)[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
    return _nibbles(blocks, 48, 128, 32) | _rows(fifth << 4), (_k_scales(blocks),)


def _q6_k(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    high = _bytes(blocks, 128, 64).reshape(*blocks.shape[:2], 2, 1, 32)
    high = (high >> (2 * jnp.arange(4, dtype=jnp.uint8))[:, None]) & 3
    scales = _words(_rows(_bytes(blocks, 192, 16)) ^ 128, jnp.uint32)
    return _nibbles(blocks, 0, 128, 64) | _rows(high << 4), (scales, _words(_rows(_bytes(blocks, 208, 2)), jnp.uint16))


def _iq4_nl(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 2, 16), (_halves(blocks, 0),)


def _iq4_xs(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    head = jnp.concatenate([_bytes(blocks, 4, 4), _bytes(blocks, 0, 4)], -1)
    return _nibbles(blocks, 8, 128), (_words(_rows(head), jnp.uint32),)


def _mxfp4(blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    return _nibbles(blocks, 1, 16), (_words(_rows(_bytes(blocks, 0)), jnp.uint16),)


FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
PACKINGS = {
    "Q4_0": Packing(4, "halves", 64, _q4_0, offset=8),
    "Q4_1": Packing(4, "pairs", 64, _q4_1),
    "Q5_0": Packing(5, "halves", 64, _q5_0, offset=16),
    "Q5_1": Packing(5, "pairs", 64, _q5_1),
    "Q8_0": Packing(8, "halves", 64, _q8_0, offset=128),
    "Q4_K": Packing(4, "K", 256, _q4_k),
    "Q5_K": Packing(5, "K", 256, _q5_k),
    "Q6_K": Packing(6, "bytes", 256, _q6_k, offset=32),
    "IQ4_NL": Packing(4, "halves", 64, _iq4_nl, levels=iq4.LEVELS),
    "IQ4_XS": Packing(4, "xs", 256, _iq4_xs, levels=iq4.LEVELS),
    "MXFP4": Packing(4, "powers", 64, _mxfp4, levels=FP4_LEVELS),
}


# --- the memory layout's interface ---------------------------------------------------------------------------------


def fits(format: str, n: int, k: int) -> str | None:
    """None if a matrix [n, k] can be packed, else the reason in words."""
    if format not in PACKINGS:
        return f"{format} has no GPU memory layout"
    return f"rows of {k} weights are not a multiple of {unit(format)}" if k % unit(format) else None


def unit(format: str) -> int:
    """How many weights of a row can be packed without the rest of it."""
    return PACKINGS[format].unit


def plane_shapes(format: str, n: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the planes of one matrix."""
    stored = jax.ShapeDtypeStruct((n, FORMATS[format].row_bytes(k)), jnp.uint8)
    return jax.eval_shape(lambda blocks: pack(blocks, format), stored)


def pack(stored: jax.Array, format: str) -> Arrays:
    """Planes of the blocks uint8 [n, bytes] of one matrix."""
    packing = PACKINGS[format]
    codes, scales = packing.read(split(stored, FORMATS[format].block_bytes))
    n, k = codes.shape
    pieces = ordered(codes).astype(jnp.uint16).reshape(n, -1, 4, 16 * groups_of(k))  # unit, piece, place
    if packing.bits == 8:
        planes = [pieces[:, :, 0::2] | (pieces[:, :, 1::2] << 8)]
    else:
        planes = [_merged(pieces & 15, 4, 1)]
        if packing.bits > 4:
            planes.append(_merged(pieces >> 4, *HIGH[packing.bits]))
    return (*map(_rows, planes), *scales)


HIGH = {5: (1, 4), 6: (2, 2)}  # bits of a field, runs of places that share a word


def _merged(pieces: jax.Array, bits: int, runs: int) -> jax.Array:
    """Fields [n, unit, piece, place] -> words [n, unit, place / runs]: run c and piece p at bits bits (4 c + p)."""
    fields = pieces.reshape(*pieces.shape[:3], runs, -1)
    parts = [fields[:, :, p, c] << (bits * (4 * c + p)) for c in range(runs) for p in range(4)]
    return functools.reduce(jnp.bitwise_or, parts)


def _fields(words: jax.Array, bits: int, runs: int) -> jax.Array:
    """The inverse."""
    mask = (1 << bits) - 1
    return jnp.stack([jnp.concatenate([(words >> (bits * (4 * c + p))) & mask for c in range(runs)], -1) for p in range(4)], 2)


def decode(planes: Arrays, format: str, n: int, k: int) -> jax.Array:
    """The weights, float32 [n, k], bit-equal to those of the blocks."""
    packing = PACKINGS[format]
    g = groups_of(k)
    words = planes[0].reshape(n, k // (64 * g), -1)
    if packing.bits == 8:
        words = words.reshape(n, -1, 2, 16 * g)
        codes = jnp.stack([words & 255, words >> 8], 3).reshape(n, -1, 4, 16 * g)
    else:
        codes = _fields(words, 4, 1)
        if packing.bits > 4:
            codes |= _fields(planes[1].reshape(n, k // (64 * g), -1), *HIGH[packing.bits]) << 4
    values = _natural(codes.reshape(n, k).astype(jnp.int32))
    if packing.levels is not None:
        values = iq4.level(values) if packing.levels is iq4.LEVELS else fp4.value_of(values)
    values = values.reshape(n, k // 64, 4, 16) - packing.offset  # group, piece
    scales = planes[2:] if 4 < packing.bits < 8 else planes[1:]
    if packing.scale == "powers":
        exponents = jnp.repeat(_octets(scales[0]), 2, -1)
        return fp4.times_power(values, exponents[..., None]).reshape(n, k)
    scale, offset = _scales(packing.scale, scales)
    weights = values.astype(jnp.float32) * scale[..., None]
    return (weights if offset is None else weights + offset[..., None]).reshape(n, k)


def _octets(words: jax.Array) -> jax.Array:
    """The bytes of words [n, any] as int32 [n, any, bytes]."""
    return spread(words, words.dtype.itemsize, 8).astype(jnp.int32)


def _half_pairs(words: jax.Array) -> jax.Array:
    """The two halves in words [...] as float32 [..., 2]. Computed by shifts, because XLA merges chains of bitcasts into
    impossible ones."""
    return half_to_float32(spread(words, 2, 16).astype(jnp.uint16))


def _scales(form: str, planes: Arrays) -> tuple[jax.Array, jax.Array | None]:
    """The scale and, if the format has one, the offset of every piece: float32 [n, groups, 4]."""
    words = planes[0]
    n = words.shape[0]
    if form in ("halves", "pairs"):
        halves = _half_pairs(words)
        if form == "halves":
            return jnp.repeat(halves, 2, -1), None
        d, m = (jnp.repeat(halves[..., i].reshape(n, -1, 2), 2, -1) for i in range(2))
        return d, m
    if form == "bytes":
        d = half_to_float32(planes[1])
        return (_octets(words) - 128).astype(jnp.float32) * jnp.repeat(d, 4, -1)[..., None], None
    words = words.reshape(n, -1, 2 if form == "xs" else 4)
    halves = _half_pairs(words[..., -1])
    if form == "xs":
        eight = jnp.arange(8, dtype=jnp.uint32)
        low = (words[..., :1] >> (4 * eight)) & 15
        high = (words[..., 1:] >> (16 + 2 * eight)) & 3
        integers = (low | (high << 4)).astype(jnp.int32) - 32
        return jnp.repeat((halves[..., :1] * integers.astype(jnp.float32)).reshape(n, -1, 2), 2, -1), None
    low, high = words[..., :2, None], words[..., 2:3, None]
    low = (low >> jnp.array([0, 4], jnp.uint32)).reshape(n, -1, 4) & 0x0F0F0F0F
    high = (high >> jnp.array([0, 2, 4, 6], jnp.uint32)).reshape(n, -1, 4) & 0x03030303
    fields = _octets(low | (high << 4)).astype(jnp.float32)  # [n, units, group, (scale, offset) of a and b]
    d, dmin = halves[..., 0, None, None], halves[..., 1, None, None]
    scale, offset = (jnp.repeat(part.reshape(n, -1, 2), 2, -1) for part in (d * fields[..., 0::2], -dmin * fields[..., 1::2]))
    return scale, offset


def rows(planes: Arrays, index: Arrays, start: jax.Array | int, count: int) -> Arrays:
    """The planes of rows start .. start + count - 1 of the matrix at `index` of the stacks."""

    def part(plane: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + (count, plane.shape[-1])
        at = (*index, jnp.asarray(start, jnp.int32), jnp.zeros((), jnp.int32))
        return lax.dynamic_slice(plane, at, sizes).reshape(sizes[-2:])

    return tuple(part(plane) for plane in planes)


def gather(planes: Arrays, ids: jax.Array) -> Arrays:
    """The planes of the rows `ids` int32 [t] of one matrix."""
    return tuple(plane[ids] for plane in planes)
