"""What the TPU kernels do with a tile of compressed weights in VMEM (memory layout "tpu": k on the sublanes, n on the lanes).

`folded` multiplies a few rows without turning codes into weights: with rows of x cut to one group of k each and stacked, one
product gives every group's sum, and only these small results are multiplied by the scales. `expand` makes bfloat16 weights,
once, for many rows. Nibbles are extracted four at a time, in 32-bit words; no arithmetic is done on bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks.format import half_to_float32
from pallas_kernels.blocks.iq4 import LEVELS
from pallas_kernels.blocks.tpu import HIGH, PACKINGS, RUN, Packing

CHUNK = 128  # weights along k per product: the depth of the matrix unit
_UNROLLED = 16  # runs; more are a loop over bodies of _BODY runs
_BODY = 8
_BY_ROW = 4  # rows up to which `folded` works row by row


@dataclasses.dataclass(frozen=True)
class Tile:
    """The planes of k weights of n outputs: refs [k', n] by their letter (see blocks/tpu.py)."""

    format: str
    k: int
    planes: dict

    @property
    def packing(self) -> Packing:
        return PACKINGS[self.format]

    @property
    def groups(self) -> int:
        return self.k // self.packing.group


def factor_rows(format: str, k: int) -> int:
    """Rows of float32 scratch that `unpack_factors` fills for a tile: scales, then minima."""
    packing = PACKINGS[format]
    return _whole(k // packing.group) * (2 if packing.minima else 1)


def _whole(groups: int) -> int:
    """Rows of scratch for the scales, in whole registers."""
    return -(-groups // 8) * 8


def unpack_factors(tile: Tile, out: Any) -> None:
    """Writes the scale of each group to the first rows of `out` (float32 ref), the minima from row `_whole(groups)` on."""
    packing, groups = tile.packing, tile.groups
    whole = _whole(groups)
    if packing.scale == "power":  # 2^-128 and 2^-127 are subnormal: zero here
        exponent = jnp.maximum(tile.planes["s"][...].astype(jnp.int32) - 1, 0)
        out[:whole] = lax.bitcast_convert_type(exponent << 23, jnp.float32)
        return
    halves = half_to_float32(tile.planes["d"][...].astype(jnp.int32))
    if packing.scale == "half":
        out[:whole] = halves[:whole]
        if packing.minima:
            out[whole : whole + groups] = -halves[groups : 2 * groups]
            if whole > groups:  # multiplied by zeros of x, so they must not be NaN
                out[whole + groups : 2 * whole] = jnp.zeros((whole - groups, out.shape[-1]), jnp.float32)
        return
    integers = tile.planes["s"][...].astype(jnp.float32)
    runs, each = tile.k // RUN, RUN // packing.group
    for run in range(runs * (2 if packing.minima else 1)):
        rows = slice(run * each, (run + 1) * each)
        out[rows] = integers[rows] * halves[run : run + 1]


def codes(tile: Tile, run: jax.Array | int, half: int) -> jax.Array:
    """The exact values of the codes of half a run: int8 or bfloat16 [128, n]. A half run at the end is half 0 of run k //
    256."""
    packing, refs = tile.packing, tile.planes
    if packing.bits == 8:
        return refs["q"][aligned((2 * run + half) * CHUNK, CHUNK)]
    if isinstance(run, int) and run == tile.k // RUN:
        q = _words(refs["q"], run, 128, 64)
        words = jnp.concatenate([q, q >> 4]) & _each(15)
    else:
        words = (_words(refs["q"], run, 128) >> (4 * half)) & _each(15)
    if packing.bits > 4:
        bits, rows, shifts = HIGH[packing.bits]
        high = _words(refs["h"], run, rows)
        pieces = len(shifts) // 2
        words |= jnp.concatenate(
            [_shift(high, 4 - s) & _each(((1 << bits) - 1) << 4) for s in shifts[half * pieces :][:pieces]]
        )
    if packing.codebook == "iq4":
        return _look_up(pltpu.bitcast(words, jnp.int8).astype(jnp.int32), LEVELS)
    if packing.codebook == "fp4":
        words = _fp4(words)
    if packing.offset:  # code - offset in two's complement; no byte carries into the next
        words = (words + _each(128 - packing.offset)) ^ _each(128)
    return pltpu.bitcast(words, jnp.int8)


def aligned(start: jax.Array | int, size: int, unit: int | None = None) -> Any:
    """[start, start + size) of a ref, start being a multiple of `unit`, or of `size`."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, unit or size), size)


def _words(ref: Any, run: jax.Array | int, rows: int, count: int | None = None) -> jax.Array:
    """Four rows of bytes a word: uint32 [rows / 4, n]."""
    return pltpu.bitcast(ref[aligned(run * rows, count or rows)], jnp.uint32)


def _each(byte: int) -> jax.Array:
    """The byte in all four places of a word."""
    return jnp.uint32(byte * 0x01010101)


def _shift(words: jax.Array, left: int) -> jax.Array:
    return words << left if left >= 0 else words >> -left


def _fp4(words: jax.Array) -> jax.Array:
    """Twice the E2M1 number of the code in each byte, in two's complement: the code, plus, if its bit 2 is set, the bits below
    it again, plus 2 if both are set; then the sign. There is no negative zero (see blocks/tpu.py)."""
    top, sign = (words >> 2) & _each(1), (words >> 3) & _each(1)
    low = words & ((top << 2) - top)
    magnitude = (words & _each(7)) + low + ((low & (low >> 1)) << 1)
    return (magnitude - sign) ^ ((sign << 8) - sign)


def _look_up(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
    """levels[code] for codes int32 [128, n]: bfloat16. The rows of one register can select among the eight rows of another."""
    shape = (8, codes.shape[1])
    tables = [jnp.full(shape, 0.0)] * 2
    for i in range(8):
        tables = [
            jnp.where(_at(shape, 0) == i, float(part[i]), t) for t, part in zip(tables, (levels[:8], levels[8:]), strict=True)
        ]
    found = []
    for start in range(0, CHUNK, 8):
        code = codes[start : start + 8]
        low, high = (jnp.take_along_axis(table, code & 7, 0, mode="promise_in_bounds") for table in tables)
        found.append(jnp.where(code < 8, low, high))
    return jnp.concatenate(found).astype(jnp.bfloat16)


def folded(tiles: Sequence[Tile], factors: Sequence, m: int, x: jax.Array) -> list[jax.Array]:
    """The first m rows of x times each tile, transposed: float32 [m, n].

    factors: of each tile, a float32 ref of `factor_rows`, which is overwritten. x: ref [8 or 16, k] of bfloat16 values,
    in bfloat16 or float32.
    """
    for tile, scratch in zip(tiles, factors, strict=True):
        unpack_factors(tile, scratch)
    return (_by_row if m <= _BY_ROW else _by_group)(tiles, factors, m, x)


def _by_row(tiles: Sequence[Tile], factors: Sequence, m: int, x: jax.Array) -> list[jax.Array]:
    """Eight groups of one row fill a register: they are multiplied by eight rows of scales, and the sublanes are summed at the
    end."""

    def step(run: jax.Array | int, halves: Any, accumulators: Any) -> Any:
        folds, sums = {}, []
        for tile, scratch, accumulator in zip(tiles, factors, accumulators, strict=True):
            group = tile.packing.group
            together = min(8 * group // CHUNK, halves)
            for half in range(0, halves, together):
                start = run * RUN + half * CHUNK
                if (group, half) not in folds:
                    folds[group, half] = _fold_rows(_columns(x, start, together * CHUNK), m, group)
                lhs, x_sums = folds[group, half]
                values = jnp.concatenate([codes(tile, run, i) for i in range(half, half + together)])
                parts = jnp.dot(lhs, values, preferred_element_type=jnp.float32)
                at = start // group
                accumulator = accumulator + parts * jnp.concatenate([scratch[aligned(at, 8)]] * m)
                if tile.packing.minima:
                    minima = scratch[aligned(_whole(tile.groups) + at, 8)]
                    accumulator = accumulator - x_sums * jnp.concatenate([minima] * m)
            sums.append(accumulator)
        return sums

    zeros = [jnp.zeros((8 * m, tile.planes["q"].shape[-1]), jnp.float32) for tile in tiles]
    return [
        jnp.concatenate([jnp.sum(result[8 * row : 8 * row + 8], 0, keepdims=True) for row in range(m)])
        for result in over_runs(tiles[0].k, step, zeros)
    ]


def _by_group(tiles: Sequence[Tile], factors: Sequence, m: int, x: jax.Array) -> list[jax.Array]:
    """All rows of one group fill a register: each is multiplied by one row of scales, spread over the sublanes."""
    rows = x.shape[0]

    def half_run(run: jax.Array | int, half: Any, accumulators: Any) -> Any:
        start = run * RUN + half * CHUNK
        part = _columns(x, start, CHUNK)
        folds = {group: _fold_groups(part, group) for group in {tile.packing.group for tile in tiles}}
        sums = []
        for tile, scratch, accumulator in zip(tiles, factors, accumulators, strict=True):
            group = tile.packing.group
            lhs, x_sums = folds[group]
            parts = jnp.dot(lhs, codes(tile, run, half), preferred_element_type=jnp.float32)
            for i in range(CHUNK // group):
                mine, at = slice(i * rows, (i + 1) * rows), start // group + i
                accumulator = accumulator + parts[mine] * scratch[pl.ds(at, 1)]
                if tile.packing.minima:
                    accumulator = accumulator - x_sums[mine] * scratch[pl.ds(_whole(tile.groups) + at, 1)]
            sums.append(accumulator)
        return sums

    def step(run: jax.Array | int, halves: Any, accumulators: Any) -> Any:
        for half in range(halves):
            accumulators = half_run(run, half, accumulators)
        return accumulators

    results = over_runs(tiles[0].k, step, [jnp.zeros((rows, tile.planes["q"].shape[-1]), jnp.float32) for tile in tiles])
    return [result[:m] for result in results]


def over_runs(k: int, step: Callable, carry: Any) -> Any:
    """carry = step(run, halves, carry) over all of k; many runs are a loop, so that programs stay small."""
    runs, done = k // RUN, 0
    if runs > _UNROLLED:

        def body(i: Any, carry: Any) -> Any:
            for run in range(_BODY):
                carry = step(i * _BODY + run, 2, carry)
            return carry

        done = runs // _BODY * _BODY
        carry = lax.fori_loop(0, runs // _BODY, body, carry)
    for run in range(done, runs):
        carry = step(run, 2, carry)
    return step(runs, 1, carry) if k % RUN else carry


def _columns(x: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return x[:, aligned(start, size, CHUNK)].astype(jnp.float32)


def _at(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _fold_rows(x: jax.Array, m: int, group: int) -> tuple[jax.Array, jax.Array]:
    """x [any, depth] -> bfloat16 [8 m, depth]: row (r, i) has row r's weights of group i, zeros elsewhere; and its sums."""
    shape = (8, x.shape[1])
    mine = _at(shape, 0) == _at(shape, 1) // group
    return _with_sums(jnp.concatenate([jnp.where(mine, x[row : row + 1], 0.0) for row in range(m)]))


def _fold_groups(x: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """x [m, 128] -> bfloat16 [m * 128 / group, 128]: row (i, r) has row r's weights of group i; and its sums."""
    m, count = x.shape[0], CHUNK // group
    shape = (count * m, CHUNK)
    mine = _at(shape, 0) // m == _at(shape, 1) // group
    return _with_sums(jnp.where(mine, jnp.concatenate([x] * count), 0.0))


def _with_sums(lhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lhs.astype(jnp.bfloat16), jnp.sum(lhs, 1, keepdims=True)


def expand(tile: Tile, factors: Any, out: Any) -> None:
    """The weights, rounded to bfloat16, into `out` (ref [k, n])."""
    unpack_factors(tile, factors)
    group, minima = tile.packing.group, tile.packing.minima

    def step(run: jax.Array | int, halves: Any, carry: Any) -> Any:
        for half in range(halves):
            start = run * RUN + half * CHUNK
            values = codes(tile, run, half).astype(jnp.float32)
            for i in range(CHUNK // group):
                weights = values[i * group : (i + 1) * group] * factors[pl.ds(start // group + i, 1)]
                if minima:
                    weights = weights - factors[pl.ds(_whole(tile.groups) + start // group + i, 1)]
                out[aligned(start + i * group, group)] = weights.astype(jnp.bfloat16)
        return carry

    over_runs(tile.k, step, 0)
