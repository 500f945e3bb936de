"""Routing in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reductions import row_max, row_sum


def route(logits: jax.Array, live: jax.Array, top_k: int, normalize: bool, scale: float) -> tuple[jax.Array, jax.Array]:
    """expert_ids int32 and expert_weights float32 [tokens, top_k]."""
    odds = jnp.exp(logits - row_max(logits))
    expert_weights, expert_ids = lax.top_k(odds / row_sum(odds), top_k)
    if normalize:
        total = row_sum(expert_weights)
        empty = total <= 0  # false for NaN, which must stay visible
        expert_weights = jnp.where(empty, 1.0 / top_k, expert_weights / jnp.where(empty, 1.0, total))
    return jnp.where(live[:, None], expert_ids, logits.shape[1]).astype(jnp.int32), expert_weights * scale
