"""Rotary position embedding in the half-split layout: value i of a head is rotated with value i + dim / 2.

Files that store queries and keys for the interleaved layout have their rows reordered at load (weights.gguf).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import Rope


def rope_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each pair: float32 [dim / 2], scaling applied (linear; YaRN, arXiv 2309.00071).

    In float32 throughout, as the models were trained: at long positions the last bit of a frequency affects the logits.
    """
    half = rope.dim // 2
    exponent = np.arange(0, rope.dim, 2).astype(np.float32) / np.float32(rope.dim)
    wavelengths = np.power(np.float32(rope.theta), exponent)
    scaling = rope.scaling
    frequencies = np.float32(1) / wavelengths
    if scaling is None:
        return frequencies
    stretched = np.float32(1) / (np.float32(scaling.factor) * wavelengths)
    if scaling.kind == "linear":
        return stretched

    def pair_that_turns(rotations: float) -> float:
        """The pair whose angle makes `rotations` full turns over the original context."""
        return half * math.log(scaling.original_context / (rotations * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    kept = 1 - np.clip((np.arange(half, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    return stretched * (1 - kept) + frequencies * kept


def rope_angles(rope: Rope, positions: jax.Array, factors: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles: float32 [tokens, 1, dim / 2]. `factors` [dim / 2] divide the frequencies of a rotation that is
    `factored` (LLaMA-3.1's long-context correction, stored in the file as `rope_freqs`)."""
    frequencies = jnp.asarray(rope_frequencies(rope))
    if factors is not None and rope.factored:
        frequencies = frequencies / factors
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    scale = rope.scaling.attention_factor if rope.scaling else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
