"""Sums whose order is fixed by the row's length alone.

XLA chooses how to reduce by the shape of the whole array, so the same row gives other bits in another batch. Sums written
as elementwise additions leave it no choice on CPU. Elsewhere they would cost a kernel each, and rows are equal within the
rounding of a sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch

_FAN_IN = 16


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which is kept with length 1: [..., n] -> [..., 1]."""
    if dispatch.target().platform != "cpu":
        return jnp.sum(x, axis=-1, keepdims=True)
    while (width := x.shape[-1]) > 1:
        parts = min(_FAN_IN, width)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % parts)])
        x = x.reshape(*x.shape[:-1], parts, -1)
        total = x[..., 0, :]
        for part in range(1, parts):
            total = total + x[..., part, :]
        x = total
    return x


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467)."""
    return x * lax.rsqrt(row_sum(x * x) / x.shape[-1] + eps) * weight
