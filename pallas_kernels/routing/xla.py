"""Routing in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reductions import row_max, row_sum


def route(logits: jax.Array, live: jax.Array, top_k: int, normalise: bool, scale: float) -> tuple[jax.Array, jax.Array]:
    """experts int32 and weights float32 [tokens, top_k]."""
    odds = jnp.exp(logits - row_max(logits))
    weights, experts = lax.top_k(odds / row_sum(odds), top_k)
    if normalise:
        total = row_sum(weights)
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / top_k)
    return jnp.where(live[:, None], experts, logits.shape[1]).astype(jnp.int32), weights * scale
