"""Norm, rotation and cache write in plain XLA, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import KVCache
from pallas_kernels.reductions import rms_norm

if TYPE_CHECKING:
    from pallas_kernels.append import Norm


def append(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array | int,
    kv_slots: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    q_norm: Norm,
    k_norm: Norm,
    eps: float,
) -> tuple[jax.Array, KVCache]:
    """As the package's contract says."""
    q, k = (rotate(x if norm is None else rms_norm(x, norm[0][norm[1]], eps), *rope) for x, norm in ((q, q_norm), (k, k_norm)))
    return q, cache.write(layer, kv_slots, k, v)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x float32 [tokens, heads, head_dim] with its first rope_dim values rotated."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
