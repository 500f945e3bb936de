"""Norm, rotation and cache write in plain XLA, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.append.operands import Norm, Operands
from pallas_kernels.paged_attention import KVCache
from pallas_kernels.reductions import rms_norm, term


def append(operands: Operands, eps: float) -> tuple[jax.Array, KVCache]:
    """As the package's contract says."""
    q, k, v, cache, layer, kv_slots, rope, *norms = operands
    q, k = (turned(x, norm, rope, eps) for x, norm in zip((q, k), norms, strict=True))
    return q, cache.write(layer, kv_slots, k, v)


def turned(x: jax.Array, norm: Norm, rope: tuple[jax.Array, jax.Array], eps: float) -> jax.Array:
    """Heads x float32 [tokens, heads, head_dim], normalized if there is a norm and rotated."""
    return rotate(x if norm is None else rms_norm(x, norm[0][norm[1]], eps), *rope)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x float32 [tokens, heads, head_dim] with its first rope_dim values rotated."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([term(first, cos) - term(second, sin), term(second, cos) + term(first, sin), rest], axis=-1)
