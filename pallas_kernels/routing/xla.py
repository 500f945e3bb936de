"""Routing in plain XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reductions import exp, row_max, row_sum, sigmoid
from pallas_kernels.routing.parts import Router


def route(logits: jax.Array, live: jax.Array, bias: jax.Array | None, router: Router) -> tuple[jax.Array, jax.Array]:
    """expert_ids int32 and expert_weights float32 [tokens, top_k]."""
    if router.scoring == "sigmoid":
        scores = sigmoid(logits)
    else:
        odds = exp(logits - row_max(logits))
        scores = odds / row_sum(odds)
    choice = scores if bias is None else scores + bias
    if router.groups > 1:
        choice = _of_best_groups(choice, router)
    expert_weights, expert_ids = lax.top_k(choice, router.top_k)
    if choice is not scores:
        expert_weights = jnp.take_along_axis(scores, expert_ids, axis=1)
    if router.normalize:
        total = row_sum(expert_weights) + router.eps
        empty = total <= 0  # false for NaN, which must stay visible
        expert_weights = jnp.where(empty, 1.0 / router.top_k, expert_weights / jnp.where(empty, 1.0, total))
    return jnp.where(live[:, None], expert_ids, logits.shape[1]).astype(jnp.int32), expert_weights * router.scale


def _of_best_groups(choice: jax.Array, router: Router) -> jax.Array:
    """`choice` [tokens, E] with -inf for the experts of all but the best groups."""
    grouped = choice.reshape(len(choice), router.groups, -1)
    best, _ = lax.top_k(grouped, router.group_best)
    totals = functools.reduce(jnp.add, (best[..., i] for i in range(router.group_best)))
    _, used = lax.top_k(totals, router.groups_used)
    is_used = (used[:, None, :] == jnp.arange(router.groups)[:, None]).any(axis=-1)
    return jnp.where(is_used[..., None], grouped, -jnp.inf).reshape(choice.shape)
