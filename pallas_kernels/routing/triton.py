"""Routing as one GPU kernel: one program per token takes the best expert top_k times. It has no groups of experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.dispatch import Case
from pallas_kernels.routing.parts import Router


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.target.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {case.target}"
    return None if case.shape[1] <= 1024 else f"{case.shape[1]} experts; 1,024 at most"


@functools.partial(jax.jit, static_argnames=("router", "interpret"), inline=True)
def route(
    logits: jax.Array, live: jax.Array, bias: jax.Array | None, router: Router, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """expert_ids int32 and expert_weights float32 [tokens, top_k]."""
    tokens, experts = logits.shape
    top_k, lanes, ranks = router.top_k, pl.next_power_of_2(experts), pl.next_power_of_2(router.top_k)

    def kernel(logits: Any, live: Any, *rest: Any) -> None:
        *biases, ids_out, weights_out = rest
        token = pl.program_id(0)
        lane, rank = jnp.arange(lanes), jnp.arange(ranks)
        values = compat.triton_load(logits.at[token, lane], mask=lane < experts, other=-jnp.inf)
        if router.scoring == "sigmoid":
            scores = 1.0 / (1.0 + jnp.exp(-values))
        else:
            odds = jnp.exp(values - jnp.max(values))
            scores = odds / jnp.sum(odds)
        choice = scores
        for bias in biases:
            choice += compat.triton_load(bias.at[lane], mask=lane < experts, other=0.0)
        left = jnp.where(lane < experts, choice, -jnp.inf)
        ids, weights = jnp.zeros(ranks, jnp.int32), jnp.zeros(ranks, jnp.float32)
        for i in range(top_k):
            best = jnp.max(left)
            expert = jnp.min(jnp.where(left == best, lane, lanes))  # ties: the smaller id
            if biases:
                best = jnp.where(expert < lanes, jnp.sum(jnp.where(lane == expert, scores, 0.0)), best)
            ids, weights = jnp.where(rank == i, expert, ids), jnp.where(rank == i, best, weights)
            left = jnp.where(lane == expert, -jnp.inf, left)
        if router.normalize:
            total = jnp.sum(weights) + router.eps
            empty = total <= 0  # false for NaN, which must stay visible
            weights = jnp.where(empty, 1.0 / top_k, weights / jnp.where(empty, 1.0, total))
        ids = jnp.where(live[token] != 0, ids, experts)
        compat.triton_store(ids_out.at[token, rank], ids, mask=rank < top_k)
        compat.triton_store(weights_out.at[token, rank], weights * router.scale, mask=rank < top_k)

    return compat.triton_call(
        kernel,
        name="route",
        grid=(tokens,),
        out_shape=[jax.ShapeDtypeStruct((tokens, top_k), dtype) for dtype in (jnp.int32, jnp.float32)],
        num_warps=1,
        interpret=interpret,
    )(logits, live.astype(jnp.int32), *([] if bias is None else [bias]))
