"""Reductions of rows, and functions of elements, that leave a row the same bits in any batch, on CPU.

XLA chooses how to reduce by the shape of the whole array: a sum gets another order, and a reduction over 4096 elements or more
becomes a library call together with the operations around it, such as an exponential, whose bits differ there from XLA's own
code. Reductions written as elementwise operations do not leave it that choice. On other devices they would cost a kernel each;
there rows are equal within rounding.

Where the code of a fused function differs within a loop (`CPU_FUSION_VARIES`), the functions here stand alone in a loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax

from pallas_kernels import dispatch

# In jaxlib 0.12 (0.11 was not tried), XLA's CPU code for an exponential that is fused with the operations around it differs in
# the last bits between the vectors of a loop and the elements after them, and so does a product that is a term of a sum.
CPU_FUSION_VARIES = tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 11)
_FAN_IN = 16


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which is kept with length 1: [..., n] -> [..., 1]."""
    if dispatch.target().platform != "cpu":
        return jnp.sum(x, axis=-1, keepdims=True)
    return _fold(x, jnp.add, 0.0)


def row_max(x: jax.Array) -> jax.Array:
    """The maximum over the last axis, which is kept with length 1: [..., n] -> [..., 1]. NaN if there is one."""
    if dispatch.target().platform != "cpu":
        return jnp.max(x, axis=-1, keepdims=True)
    return _fold(x, jnp.maximum, -jnp.inf)


def _fold(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array], neutral: float) -> jax.Array:
    """Combines the last axis in an order that depends only on its length: [..., n] -> [..., 1]."""
    while (width := x.shape[-1]) > 1:
        parts = min(_FAN_IN, width)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % parts)], constant_values=neutral)
        x = x.reshape(*x.shape[:-1], parts, -1)
        x = functools.reduce(combine, (x[..., part, :] for part in range(parts)))
    return x


def product(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x * y, rounded. Without the barrier XLA may compute it inside the sum that it is a term of, as a fused multiply-add;
    whether it does depends on the shape of the whole array."""
    return lax.optimization_barrier(x * y)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467)."""
    return x * lax.rsqrt(row_sum(term(x, x)) / x.shape[-1] + eps) * weight


def term(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, one of several products that are summed."""
    return product(x, y) if _varies() else x * y


def exp(x: jax.Array) -> jax.Array:
    """e to the power of each element."""
    return _alone(jnp.exp, x)


def log(x: jax.Array) -> jax.Array:
    """The natural logarithm of each element."""
    return _alone(jnp.log, x)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)). exp(-x) would overflow for large -x, and the derivative then be infinity times 0."""
    if not _varies():
        return jax.nn.sigmoid(x)
    small = exp(-jnp.abs(x))
    return jnp.where(x >= 0, 1.0, small) / (1 + small)


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), without overflow."""
    return jnp.maximum(x, 0) + _alone(jnp.log1p, exp(-jnp.abs(x))) if _varies() else jax.nn.softplus(x)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (arXiv 1606.08415)."""
    if not _varies():
        return jax.nn.gelu(x, approximate=True)
    cube = product(product(x, x), x)
    return 0.5 * x * (1 + _alone(jnp.tanh, (2 / math.pi) ** 0.5 * (x + product(cube, 0.044715))))


def _alone(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(function(lax.optimization_barrier(x))) if _varies() else function(x)


def _varies() -> bool:
    return CPU_FUSION_VARIES and dispatch.target().platform == "cpu"
