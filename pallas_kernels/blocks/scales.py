"""Scales and codes with which blocks approximate given weights, with a small mean square error.

The idea: every search is a short list of trials, each of which divides, rounds and sums; the sums give the trial's
least-squares scale and error in closed form, so all groups of a chunk go through the same few dense passes. Weights come as y
[n, groups, blocks], n weights in each group of a block, blocks on the contiguous axis, so that a sum over a group is n vector
additions. Each block is divided by its largest magnitude first (`unit`): the search then has neither overflow nor underflow,
and only `halved` takes the true size into account, for half precision.

All weights count the same: the plain squared error is minimized, which also minimizes the expected error of a layer's output if
nothing is known about its input. This is why the error can be below that of llama.cpp, which weights by magnitude.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .iq4 import LEVELS

_SMALLEST = 1e-30  # smaller blocks are zero in every format: half precision ends at 6e-8


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that a code can have, before its scale: integers low..high, or `levels`. `trials`: the values tried for the
    weight of largest magnitude, the simplest first; `other`: a second simple choice."""

    low: int
    high: int
    other: int
    trials: tuple[float, ...]
    levels: tuple[int, ...] = ()

    def nearest(self, y: jax.Array) -> jax.Array:
        if not self.levels:
            return jnp.clip(jnp.round(y), self.low, self.high)
        steps = [jnp.where(y > (a + b) / 2, float(b - a), 0.0) for a, b in zip(self.levels, self.levels[1:], strict=False)]
        return functools.reduce(jnp.add, steps, jnp.float32(self.levels[0]))

    def code(self, value: jax.Array) -> jax.Array:
        """The unsigned code of one of the values, uint8."""
        if not self.levels:
            return (value - self.low).astype(jnp.uint8)
        return functools.reduce(jnp.add, [(value > level).astype(jnp.uint8) for level in self.levels[:-1]])


def _around(end: int, reach: float, count: int) -> tuple[float, ...]:
    """`count` values around `end`, and as many around the other end of the grid."""
    steps = [end + reach * (2 * i / (count - 1) - 1) for i in range(count)]
    return (float(end), *steps, *(-(step + 1) for step in steps))


THREE = Grid(-4, 3, -3, _around(-4, 0.9, 7))
FOUR = Grid(-8, 7, 7, _around(-8, 0.9, 7))
FIVE = Grid(-16, 15, 15, _around(-16, 0.9, 6))
SIX = Grid(-32, 31, -31, _around(-32, 1.0, 6))
EIGHT = Grid(-127, 127, 126, (127.0, 126.5, 127.4))
UNEVEN = Grid(-127, 113, 113, (-127.0, -119.0, -111.0, -135.0, 113.0, 107.0, 101.0, 119.0), LEVELS)


def unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights x [n, groups, blocks] -> y, each block divided by its largest magnitude, and that magnitude [blocks]."""
    largest = jnp.max(jnp.abs(x), (0, 1))
    return lax.optimization_barrier((x * _inverse(jnp.where(largest < _SMALLEST, 0.0, largest)), largest))


def halved(scale: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A scale in units of `largest`, rounded to half precision: the result in the same units, and the half itself."""
    half = (scale * largest).astype(jnp.float16)
    return half.astype(jnp.float32) * _inverse(largest), half


def total(term: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
    """The sum of term(y) over the weights of each group: [groups, blocks].

    Written out, and followed by a barrier: XLA compiles it to one vector loop over the groups (a reduction would be a scalar
    one) and cannot repeat it in every expression that uses the sum."""
    return lax.optimization_barrier(functools.reduce(jnp.add, [term(y[i]) for i in range(y.shape[0])]))


def _inverse(values: jax.Array) -> jax.Array:
    return jnp.where(values == 0, 0.0, 1.0 / jnp.where(values == 0, 1.0, values))


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return above * _inverse(below)


def _largest(values: jax.Array, axis: int) -> jax.Array:
    """The value of largest magnitude along an axis, with its sign."""
    high, low = jnp.max(values, axis), jnp.min(values, axis)
    return jnp.where(high >= -low, high, low)


def _best(trial: Callable[[jax.Array], tuple[jax.Array, ...]], trials: Sequence[float]) -> tuple[jax.Array, ...]:
    """Elementwise, the results of `trial` for the number of the list with the least error (its first result); the first of
    equals."""

    def step(i: Any, best: Any) -> Any:
        return _better(best, trial(numbers[i]))

    numbers = jnp.array(trials, jnp.float32)
    return lax.fori_loop(1, len(trials), step, trial(numbers[0]))


def _better(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.where(b[0] < a[0], new, old) for old, new in zip(a, b, strict=True))


_NEIGHBORS = (0.0, -1.0, 1.0)
_PAIRS = tuple((i, j) for j in _NEIGHBORS for i in _NEIGHBORS)


# ---- one scale, codes around zero


def fit(y: jax.Array, grid: Grid) -> jax.Array:
    """The least-squares scale of every group: [groups, blocks]."""
    step = _inverse(_largest(y, 0))

    def trial(number: Any) -> Any:
        yq = total(lambda y: y * grid.nearest(y * (number * step)), y)
        qq = total(lambda y: jnp.square(grid.nearest(y * (number * step))), y)
        gain = _ratio(yq * yq, qq)  # how much the scale reduces the sum of squares; a little more for the simplest
        return jnp.where(number == grid.trials[0], -gain * (1 + 1e-6), -gain), _ratio(yq, qq)

    return _best(trial, grid.trials)[1]


def single(x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Blocks of one group x [n, 1, blocks] -> codes uint8 [n, 1, blocks] and the scale, float16 [blocks]."""
    y, largest = unit(x)
    extreme = _largest(y, 0)
    tried = jnp.stack([extreme / grid.trials[0], extreme / grid.other, fit(y, grid)])

    def trial(number: Any) -> Any:
        s, half = halved(tried[number.astype(jnp.int32)], largest)
        return total(lambda y: jnp.square(y - s * grid.nearest(y * _inverse(s))), y), half, s

    _, half, s = _best(trial, range(3))
    return grid.code(grid.nearest(y * _inverse(s))), half[0]


# ---- integer scales under one half


def double(x: jax.Array, grid: Grid, low: int, high: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [n, groups, blocks] -> codes uint8 of that shape, integer scales int32 [groups, blocks] in low..high, and the
    scale over them, float16 [blocks]."""
    y, largest = unit(x)
    fitted = fit(y, grid)

    def under(scale: Any) -> Any:
        """Error, half, its value and the integers for a scale over them."""
        s, half = halved(scale, largest)
        middle = jnp.round(fitted * _inverse(s))

        def trial(step: Any) -> Any:
            k = jnp.clip(middle + step, low, high)
            return total(lambda y: jnp.square(y - s * k * grid.nearest(y * _inverse(s * k))), y), k

        errors, k = _best(trial, _NEIGHBORS)
        return jnp.sum(errors, 0), half, s, k

    def refit(best: Any) -> Any:
        """The least-squares scale for the current codes and integers."""
        _, _, s, k = best
        inverse = _inverse(s * k)
        yq = total(lambda y: y * grid.nearest(y * inverse), y)
        qq = total(lambda y: jnp.square(grid.nearest(y * inverse)), y)
        return _ratio(jnp.sum(k * yq, 0), jnp.sum(k * k * qq, 0))

    plain = _largest(fitted, 0) / low
    best = _better(under(plain), under(plain * grid.trials[0] / grid.other))
    _, half, s, k = _better(best, under(refit(best)))
    return grid.code(grid.nearest(y * _inverse(s * k))), k.astype(jnp.int32), half


# ---- scale and offset


def fit_affine(y: jax.Array, top: int, trials: int, free: bool) -> tuple[jax.Array, jax.Array]:
    """Least-squares scale a and offset b of every group, y = a q + b with q in 0..top: [groups, blocks] each. b is at
    most zero unless `free`."""
    n = y.shape[0]
    low, high = jnp.min(y, 0), jnp.max(y, 0)
    if not free:
        low = jnp.minimum(low, 0.0)
    width = high - low
    z = lax.optimization_barrier(y - low)
    sum_z, sum_zz = total(lambda z: z, z), total(jnp.square, z)

    def trial(number: Any) -> Any:
        end, shift = ends[number.astype(jnp.int32)]
        step = end * _inverse(width)
        q = total(lambda z: _codes(z * step + shift, top), z)
        qq = total(lambda z: jnp.square(_codes(z * step + shift, top)), z)
        zq = total(lambda z: z * _codes(z * step + shift, top), z)
        a = _ratio(n * zq - sum_z * q, n * qq - q * q)
        b = (sum_z - a * q) / n
        if not free:
            over = low + b > 0
            a, b = jnp.where(over, _ratio(zq + low * q, qq), a), jnp.where(over, -low, b)
        plain = number == 0  # the range itself; others must be better by more than rounding
        a, b = jnp.where(plain, width / top, a), jnp.where(plain, 0.0, b)
        error = sum_zz - 2 * (a * zq + b * sum_z) + a * a * qq + 2 * a * b * q + n * b * b
        error = jnp.where(plain, error, jnp.where(a > 0, error + 1e-6 * sum_zz, jnp.inf))
        return error, a, low + b

    # The code at which the range ends, and how far from code 0 it begins. The first is the range itself.
    reach = 2.0 * top / (top + 1)
    steps = [(reach * (2 * i / (trials - 1) - 1), shift) for shift in (0.0, -0.3, 0.3) for i in range(trials)]
    ends = jnp.array([(top, 0.0), *((top + more, shift) for more, shift in steps)], jnp.float32)
    _, scale, offset = _best(trial, range(len(ends)))
    return scale, offset


def _codes(values: jax.Array, top: int) -> jax.Array:
    return jnp.clip(jnp.round(values), 0, top)


def single_affine(x: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [n, 1, blocks] -> codes uint8 [n, 1, blocks], scale and offset float16 [blocks] each."""
    y, largest = unit(x)
    low, high = jnp.min(y, 0), jnp.max(y, 0)
    scale, offset = fit_affine(y, top, 5, free=True)
    tried = jnp.stack([(high - low) / top, scale]), jnp.stack([low, offset])

    def trial(number: Any) -> Any:
        (s, d), (o, m) = (halved(part[number.astype(jnp.int32)], largest) for part in tried)
        return total(lambda y: jnp.square(y - s * _codes((y - o) * _inverse(s), top) - o), y), d, m, s, o

    _, d, m, s, o = _best(trial, range(2))
    return _codes((y - o) * _inverse(s), top).astype(jnp.uint8), d[0], m[0]


def double_affine(x: jax.Array, top: int, most: int) -> tuple[jax.Array, ...]:
    """x [n, groups, blocks], w = d scale q - dmin offset -> codes uint8 of that shape, scales and offsets int32
    [groups, blocks] in 0..most, d and dmin float16 [blocks]."""
    y, largest = unit(x)
    n = y.shape[0]
    a, b = fit_affine(y, top, 6, free=False)
    sum_y = total(lambda y: y, y)

    def under(scale: Any, minimum: Any) -> Any:
        """Error, the halves, their values and the integers for a scale and a minimum over them."""
        s, d = halved(scale, largest)
        o, dmin = halved(minimum, largest)
        middle = jnp.round(a * _inverse(s))
        pairs = jnp.array(_PAIRS)

        def trial(number: Any) -> Any:
            step, other = pairs[number.astype(jnp.int32)]
            k = jnp.clip(middle + step, 0, most)
            inverse = _inverse(s * k)
            offset = (s * k * total(lambda y: _codes((y - b) * inverse, top), y) - sum_y) / n
            m = jnp.clip(jnp.round(offset * _inverse(o)) + other, 0, most)
            return total(lambda y: jnp.square(y + o * m - s * k * _codes((y + o * m) * inverse, top)), y), k, m

        errors, k, m = _best(trial, range(len(_PAIRS)))
        return jnp.sum(errors, 0), d, dmin, s, o, k, m

    def refit(best: Any) -> Any:
        """The least-squares scale and minimum for the current codes and integers."""
        _, _, _, s, o, k, m = best
        inverse = _inverse(s * k)
        q = total(lambda y: _codes((y + o * m) * inverse, top), y)
        qq = total(lambda y: jnp.square(_codes((y + o * m) * inverse, top)), y)
        yq = total(lambda y: y * _codes((y + o * m) * inverse, top), y)
        uu, uv, vv = (jnp.sum(part, 0) for part in (k * k * qq, k * m * q, n * m * m))
        yu, yv = jnp.sum(k * yq, 0), jnp.sum(m * sum_y, 0)
        full = uu * vv - uv * uv
        both = full > 1e-6 * uu * vv
        scale = jnp.where(both, _ratio(vv * yu - uv * yv, full), _ratio(yu + o * uv, uu))
        minimum = jnp.where(both, _ratio(uv * yu - uu * yv, full), o)
        return jnp.where(scale > 0, scale, s), jnp.where(minimum > 0, minimum, o)

    ends = jnp.max(a, 0), jnp.max(jnp.abs(b), 0)
    best = _better(*(under(*(end / (most - less) for end in ends)) for less in (0, 1)))
    _, d, dmin, s, o, k, m = _better(best, under(*refit(best)))
    codes = _codes((y + o * m) * _inverse(s * k), top).astype(jnp.uint8)
    return codes, k.astype(jnp.int32), m.astype(jnp.int32), d, dmin
