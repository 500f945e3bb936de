"""Routing as one GPU kernel: one program per token takes the largest probability top_k times."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.dispatch import Case


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.target.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {case.target}"
    return None if case.shape[1] <= 1024 else f"{case.shape[1]} experts; 1,024 at most"


@functools.partial(jax.jit, static_argnames=("top_k", "normalize", "scale", "interpret"), inline=True)
def route(
    logits: jax.Array, live: jax.Array, top_k: int, normalize: bool, scale: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """expert_ids int32 and expert_weights float32 [tokens, top_k]."""
    tokens, experts = logits.shape
    lanes, ranks = pl.next_power_of_2(experts), pl.next_power_of_2(top_k)

    def kernel(logits: Any, live: Any, ids_out: Any, weights_out: Any) -> None:
        token = pl.program_id(0)
        lane, rank = jnp.arange(lanes), jnp.arange(ranks)
        values = compat.triton_load(logits.at[token, lane], mask=lane < experts, other=-jnp.inf)
        odds = jnp.exp(values - jnp.max(values))
        left = jnp.where(lane < experts, odds / jnp.sum(odds), -1.0)
        ids, weights = jnp.zeros(ranks, jnp.int32), jnp.zeros(ranks, jnp.float32)
        for i in range(top_k):
            best = jnp.max(left)
            expert = jnp.min(jnp.where(left == best, lane, lanes))  # ties: the smaller id
            ids, weights = jnp.where(rank == i, expert, ids), jnp.where(rank == i, best, weights)
            left = jnp.where(lane == expert, -1.0, left)
        if normalize:
            total = jnp.sum(weights)
            empty = total <= 0  # false for NaN, which must stay visible
            weights = jnp.where(empty, 1.0 / top_k, weights / jnp.where(empty, 1.0, total))
        ids = jnp.where(live[token] != 0, ids, experts)
        compat.triton_store(ids_out.at[token, rank], ids, mask=rank < top_k)
        compat.triton_store(weights_out.at[token, rank], weights * scale, mask=rank < top_k)

    return compat.triton_call(
        kernel,
        name="route",
        grid=(tokens,),
        out_shape=[jax.ShapeDtypeStruct((tokens, top_k), dtype) for dtype in (jnp.int32, jnp.float32)],
        num_warps=1,
        interpret=interpret,
    )(logits, live.astype(jnp.int32))
