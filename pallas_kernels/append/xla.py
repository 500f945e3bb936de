"""Norm, rotation and cache write in plain XLA, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.append.operands import Operands
from pallas_kernels.paged_attention import KVCache
from pallas_kernels.reductions import rms_norm


def append(operands: Operands, eps: float) -> tuple[jax.Array, KVCache]:
    """As the package's contract says."""
    q, k, v, cache, layer, kv_slots, rope, *norms = operands
    q, k = (
        rotate(x if norm is None else rms_norm(x, norm[0][norm[1]], eps), *rope) for x, norm in zip((q, k), norms, strict=True)
    )
    return q, cache.write(layer, kv_slots, k, v)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x float32 [tokens, heads, head_dim] with its first rope_dim values rotated."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
