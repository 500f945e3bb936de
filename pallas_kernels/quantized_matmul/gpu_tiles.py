"""Tiles of a compressed matrix as operands of tensor cores, and the loop over k that every Triton kernel here is made of.

The words of memory layout "gpu" reach registers in the order of a tensor-core operand, so they are unpacked in place: two
weights at a time, with one mask and one packed multiply-add (inline PTX, with equivalent jnp code for interpret mode).

In bfloat16 the field of a code is used directly: bits 0..7 of a bfloat16 are linear, n stands for n * 2^-133, because exponents
0 and 1 share their spacing. Scales carry the inverse factor, and a factor of 2^-32 that keeps them in range and is undone on
the float32 sums. In float16 the field is inserted into the mantissa of 1024, which is subtracted again. Either way a weight is
round(n * scale + offset) with scale and offset rounded to the dtype: three roundings if an offset is added, otherwise two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.blocks import gpu, iq4

Pair = tuple[jax.Array, jax.Array]
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How integers become numbers of a dtype. A field n counts as n * 2^-exponent; scales are stored times
    2^(exponent - range), offsets and with them weights times 2^-range."""

    dtype: Any
    suffix: str
    exponent: int
    range: int

    def stored_scale(self, scale: jax.Array) -> jax.Array:
        return scale * jnp.float32(2.0 ** (self.exponent - self.range))

    def stored_offset(self, offset: jax.Array) -> jax.Array:
        return offset * jnp.float32(2.0**-self.range)


_ARITHMETIC = {
    jnp.dtype(jnp.bfloat16): Arithmetic(jnp.bfloat16, "bf16x2", 133, 32),
    jnp.dtype(jnp.float16): Arithmetic(jnp.float16, "f16x2", 0, 0),
}


def restore(total: jax.Array, format: str, dtype: Any) -> jax.Array:
    """Sums of products with the pieces of a matrix, without the factor that the weights carry."""
    if gpu.PACKINGS[format].scale == "powers":
        return total
    return total * jnp.float32(2.0 ** _ARITHMETIC[jnp.dtype(dtype)].range)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A matrix inside a kernel: references to its planes, and the scalars that index their stacks."""

    format: str
    columns: int
    planes: Sequence[Any]
    lead: tuple[jax.Array, ...]
    counts: Any  # counts[n]: int32 [n], 0 to n - 1, loaded because Triton does not convert an iota to the layout of an operand

    @property
    def packing(self) -> gpu.Packing:
        return gpu.PACKINGS[self.format]

    @property
    def groups(self) -> int:
        return gpu.groups_of(self.columns)

    def words(self, plane: int, rows: jax.Array, first: jax.Array | int, width: int) -> jax.Array:
        """[rows, width] words of the rows, from word `first` on."""
        return self.at(plane, rows, first + lax.iota(jnp.int32, width))

    def at(self, plane: int, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """[rows, columns] words."""
        reference = self.planes[plane]
        return compat.triton_load(reference.at[(*self.lead, rows[:, None], columns[None, :])])


# --- packed arithmetic ---------------------------------------------------------------------------------------------


def _asm(body: str, dtype: Any, pack: int, *args: jax.Array, constraints: str) -> jax.Array:
    return compat.triton_asm(
        "{ .reg .b32 t, u, v; " + body + " }",
        args=args,
        constraints=constraints,
        pack=pack,
        result=jax.ShapeDtypeStruct(args[0].shape, dtype),
    )


def _affine(how: Arithmetic, field: str) -> str:
    """PTX: $0 = t * scale + offset for the two fields in t; `field` computes t, {scale} and {offset} are registers."""
    if how.exponent:
        return field + "fma.rn.bf16x2 $0, t, {scale}, {offset};"
    one = "mov.b32 u, 0x3C003C00; mov.b32 v, 0xE400E400; fma.rn.f16x2 t, t, u, v;"  # times 1, minus 1024
    return field + "or.b32 t, t, 0x64006400; " + one + "fma.rn.f16x2 $0, t, {scale}, {offset};"


def _affine_twin(how: Arithmetic, n: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    half = how.exponent // 2  # the factor is applied in two parts: XLA would flush 2^-133 to zero
    factor = lax.optimization_barrier(scale.astype(jnp.float32) * jnp.float32(2.0**-half))
    value = n.astype(jnp.float32) * (factor * jnp.float32(2.0 ** (half - how.exponent)))
    return (value + offset.astype(jnp.float32)).astype(how.dtype)


def field(
    how: Arithmetic, words: jax.Array, shift: int, mask: int, scale: jax.Array, offset: jax.Array, interpret: bool
) -> jax.Array:
    """((words >> shift) & mask) * scale + offset of uint16 words; at most 8 bits."""
    if interpret:
        return _affine_twin(how, (words >> shift) & mask, scale, offset)
    move = f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    text = _affine(how, f"{move} and.b32 t, t, 0x{mask:04x}{mask:04x}; ").format(scale="$2", offset="$3")
    return _asm(text, how.dtype, 2, words, scale, offset, constraints="=r,r,r,r")


def split_field(
    how: Arithmetic,
    words: jax.Array,
    shift: int,
    high: jax.Array,
    at: jax.Array,
    bits: int,
    scale: jax.Array,
    offset: jax.Array,
    interpret: bool,
) -> jax.Array:
    """(((words >> shift) & 15) | (((high >> at) & (2^bits - 1)) << 4)) * scale + offset; `at` int32, one for each word."""
    mask = (1 << bits) - 1
    if interpret:
        n = (((high.astype(jnp.int32) >> at) & mask) << 4) | ((words >> shift) & 15).astype(jnp.int32)
        return _affine_twin(how, n, scale, offset)
    wide = mask << 4
    text = (
        (f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;")
        + "and.b32 t, t, 0x000f000f; shf.r.wrap.b32 u, $2, $2, $3;"
        + f"lop3.b32 t, u, 0x{wide:04x}{wide:04x}, t, 0xea; "
    )
    text = _affine(how, text).format(scale="$5", offset="$6")
    turn = (at - 4) & 31  # both words of a register are rotated together, so that their fields get to bit 4
    return _asm(text, how.dtype, 2, words, high, turn, scale, offset, constraints="=r,r,r,r,r,r,r")


def level_bytes(words: jax.Array, levels: Sequence[int], interpret: bool) -> jax.Array:
    """int32 of four bytes for each uint16 word: `levels` + 128 of its four codes."""
    octets = [level + 128 for level in levels]
    table = [sum(octets[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)]
    if interpret:
        parts = [(iq4.level(((words >> (4 * p)) & 15).astype(jnp.int32)) + 128) << (8 * p) for p in range(4)]
        return parts[0] | parts[1] | parts[2] | parts[3]
    # The low three bits of a selector's nibble choose one of eight bytes; the fourth bit then chooses the half of the table.
    text = (
        "and.b32 t, $1, 0x7777; mov.b32 u, 0x{:08x}; prmt.b32 u, u, 0x{:08x}, t;"
        "mov.b32 v, 0x{:08x}; prmt.b32 v, v, 0x{:08x}, t;"
        "shr.b32 t, $1, 1; and.b32 t, t, 0x4444; or.b32 t, t, 0x3210; prmt.b32 $0, u, v, t;"
    ).format(*table)
    return _asm(text, jnp.int32, 1, words.astype(jnp.int32), constraints="=r,r")


def byte_field(
    how: Arithmetic, octets: jax.Array, piece: int, scale: jax.Array, offset: jax.Array, interpret: bool
) -> jax.Array:
    """Byte `piece` of each int32, times scale, plus offset."""
    if interpret:
        return _affine_twin(how, (octets >> (8 * piece)) & 255, scale, offset)
    text = f"prmt.b32 t, $1, $2, 0x0{4 + piece}0{piece}; and.b32 t, t, 0x00ff00ff; "
    text = _affine(how, text).format(scale="$3", offset="$4")
    return _asm(text, how.dtype, 2, octets, scale, offset, constraints="=r,r,r,r,r")


def fp4_field(how: Arithmetic, words: jax.Array, piece: int, scale: jax.Array, interpret: bool) -> jax.Array:
    """The E2M1 number in nibble `piece` of each word, times scale: its bits are moved into those of the dtype."""
    if interpret:
        code = ((words >> (4 * piece)) & 15).astype(jnp.int32)
        magnitude = (jnp.uint32(0xC8643210) >> (4 * (code & 7)).astype(jnp.uint32)) & 15
        value = jnp.where(code > 7, -0.5, 0.5) * magnitude.astype(jnp.float32)
        return (value * scale.astype(jnp.float32)).astype(how.dtype)
    low, fixed = (6, 0x7E80) if how.exponent else (9, 0x7400)  # place of the magnitude; 2^126, 2^14: the smallest exponent

    def moved(register: str, by: int) -> str:
        return f"{'shl' if by > 0 else 'shr'}.b32 {register}, $1, {abs(by)};"

    mask = 7 << low
    text = (
        moved("t", low - 4 * piece)
        + moved("u", 12 - 4 * piece)
        + f"and.b32 t, t, 0x{mask:04x}{mask:04x}; lop3.b32 t, u, 0x80008000, t, 0xea; mov.b32 v, 0x80008000;"
        + f"mov.b32 u, 0x{fixed:04x}{fixed:04x}; fma.rn.{how.suffix} t, t, u, v; fma.rn.{how.suffix} $0, t, $2, v;"
    )
    return _asm(text, how.dtype, 2, words, scale, constraints="=r,r,r")


# --- scales --------------------------------------------------------------------------------------------------------


def _half(words: jax.Array) -> jax.Array:
    """The half in the low 16 bits, float32."""
    return lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def _number(words: jax.Array, shift: int, mask: int = 255) -> jax.Array:
    return ((words >> shift) & jnp.uint32(mask)).astype(jnp.int32).astype(jnp.float32)


def _ahead(operand: Operand, rows: jax.Array, unit: jax.Array) -> list[jax.Array]:
    """The part of a step that Triton does not prefetch, because it is narrower than four bytes; the loop carries it."""
    return [operand.words(3, rows, unit, 1)] if operand.packing.scale == "bytes" else []


def _scales(operand: Operand, rows: jax.Array, unit: jax.Array, ahead: Sequence[jax.Array], how: Arithmetic) -> list[Pair]:
    """Scale and offset of every group of the unit, as the arithmetic uses them: float32 [rows, groups] each.

    One pair for each piece, or one for two pieces that share it.
    """
    packing = operand.packing
    plane = 2 if 4 < packing.bits < 8 else 1
    groups = operand.groups
    every = lax.iota(jnp.int32, groups)
    first = unit * groups
    offset = 128 if packing.levels else packing.offset

    def centered(scale: jax.Array) -> Pair:
        return how.stored_scale(scale), how.stored_offset(scale * jnp.float32(-offset))

    if packing.scale == "pairs":
        both = [operand.at(plane, rows, 2 * (first + every) + i) for i in range(2)]
        return [(how.stored_scale(_half(w)), how.stored_offset(_half(w >> 16))) for w in both]
    if packing.scale == "halves":
        words = operand.at(plane, rows, first + every)
        return [centered(_half(w)) for w in (words, words >> 16)]
    if packing.scale == "bytes":
        words = operand.at(plane, rows, first + every)
        d = _half(ahead[0])
        return [centered(d * (_number(words, 8 * p) - 128)) for p in range(4)]
    if packing.scale == "xs":
        low, high = (operand.words(plane, rows, 2 * unit + i, 1) for i in range(2))
        d, pairs = _half(high), []
        for i in range(2):
            group = (2 * operand.counts[groups] + i).astype(jnp.uint32)[None]
            integer = ((low >> (4 * group)) & 15) | (((high >> (16 + 2 * group)) & 3) << 4)
            pairs.append(centered(d * (integer.astype(jnp.int32).astype(jnp.float32) - 32)))
        return pairs
    if packing.scale == "powers":
        words = operand.at(plane, rows, first + every).astype(jnp.int32)
        powers = [lax.bitcast_convert_type(((words >> (8 * i)) & 255) << 23, jnp.float32) for i in range(2)]
        return [(power, power) for power in powers]
    low = operand.at(plane, rows, first + every // 2)
    high, halves = (operand.words(plane, rows, first + i, 1) for i in (2, 3))
    group = operand.counts[groups].astype(jnp.uint32)[None]
    fields = ((low >> (4 * (group & 1))) & jnp.uint32(0x0F0F0F0F)) | (((high >> (2 * group)) & jnp.uint32(0x03030303)) << 4)
    d, dmin = how.stored_scale(_half(halves)), how.stored_offset(-_half(halves >> 16))
    return [(d * _number(fields, 16 * i), dmin * _number(fields, 16 * i + 8)) for i in range(2)]


def _spread(pair: Pair, groups: int, how: Arithmetic) -> Pair:
    """[rows, groups] -> [rows, places] of the dtype. Both are packed into one word, so that the layout is converted only
    once."""
    rows = pair[0].shape[0]
    scale, offset = (lax.bitcast_convert_type(part.astype(how.dtype), jnp.uint16).astype(jnp.uint32) for part in pair)
    word = lax.bitcast_convert_type(scale | (offset << 16), jnp.int32)
    places = lax.broadcast_in_dim(word, (rows, 2 * groups, groups, 8 // groups), (0, 2)).reshape(rows, 16 * groups)
    high = lax.shift_right_logical(places, jnp.int32(16))
    scale, offset = (lax.bitcast_convert_type(part.astype(jnp.uint16), how.dtype) for part in (places, high))
    return scale, offset


# --- the loop ------------------------------------------------------------------------------------------------------


def pieces(
    operand: Operand, rows: jax.Array, unit: jax.Array, ahead: Sequence[jax.Array], dtype: Any, interpret: bool
) -> Callable[[int], jax.Array]:
    """A function that decodes piece 0..3 of a unit of k for some rows of the matrix: [rows, places] of `dtype`."""
    how, packing, groups = _ARITHMETIC[jnp.dtype(dtype)], operand.packing, operand.groups
    width = 16 * groups
    pairs = [_spread(pair, groups, how) for pair in _scales(operand, rows, unit, ahead, how)]

    def scales(piece: int) -> Pair:
        return pairs[piece * len(pairs) // 4]

    if packing.bits == 8:
        halves = [operand.words(0, rows, (2 * unit + i) * width, width) for i in range(2)]
        return lambda p: field(how, halves[p // 2], 8 * (p % 2), 255, *scales(p), interpret)
    words = operand.words(0, rows, unit * width, width)
    if packing.scale == "powers":
        return lambda p: fp4_field(how, words, p, scales(p)[0], interpret)
    if packing.levels:
        octets = level_bytes(words, packing.levels, interpret)
        return lambda p: byte_field(how, octets, p, *scales(p), interpret)
    if packing.bits > 4:
        bits, runs = gpu.HIGH[packing.bits]
        high = operand.words(1, rows, unit * (width // runs), width // runs)
        shape = (rows.shape[0], runs, width // runs)
        high = lax.broadcast_in_dim(high, shape, (0, 2)).reshape(-1, width)
        run = lax.broadcast_in_dim(operand.counts[runs], shape, (1,)).reshape(-1, width)
        return lambda p: split_field(how, words, 4 * p, high, run * (4 * bits) + bits * p, bits, *scales(p), interpret)
    return lambda p: _nibble(how, words, p, *scales(p), interpret)


def _nibble(how: Arithmetic, words: jax.Array, piece: int, scale: jax.Array, offset: jax.Array, interpret: bool) -> jax.Array:
    """Odd pieces stay in place, four bits up, which saves their shift."""
    shift, odd = 8 * (piece // 2), piece % 2
    return field(how, words, shift, 0xF0 if odd else 0x0F, scale * how.dtype(1 / 16) if odd else scale, offset, interpret)


def products(
    operands: Sequence[Operand],
    rows: jax.Array,
    load_x: Callable[[jax.Array, int], jax.Array],
    batch: int,
    dtype: Any,
    interpret: bool,
    part: tuple[jax.Array | int, int] = (0, 1),
) -> list[jax.Array]:
    """Rows of each matrix times the rows of x: float32 [rows, batch] each.

    load_x(first, width): x in the order of the planes, [batch, width] from column `first` on. part (i, n): only the i-th
    of n equal runs of k.
    """
    width = 16 * operands[0].groups
    units = operands[0].columns // (4 * width) // part[1]
    first, last = part[0] * units, (part[0] + 1) * units - 1

    def ahead_of(unit: Any) -> Any:
        return [_ahead(operand, rows, unit) for operand in operands]

    def step(i: Any, carry: Any) -> Any:
        totals, ahead = carry
        unit = first + i
        tiles = [pieces(operand, rows, unit, one, dtype, interpret) for operand, one in zip(operands, ahead, strict=True)]
        ahead = ahead_of(jnp.minimum(unit + 1, last))
        for piece in range(4):
            x = load_x((4 * unit + piece) * width, width)
            totals = [
                total + lax.dot_general(tile(piece), x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
                for total, tile in zip(totals, tiles, strict=True)
            ]
        return totals, ahead

    zero = jnp.zeros((rows.shape[0], batch), jnp.float32)
    totals, _ = lax.fori_loop(0, units, step, ([zero for _ in operands], ahead_of(first)))
    return [restore(total, operand.format, dtype) for total, operand in zip(totals, operands, strict=True)]
