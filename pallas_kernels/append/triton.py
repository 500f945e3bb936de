"""Norm, rotation and cache write as one GPU kernel: one program per token and head stores keys and values in the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.append.operands import Operands
from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention import KVCache


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.target.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {case.target}"
    return None if case.format in ("float32", "bfloat16", "float16") else f"a {case.format} cache is written by XLA"


def append(operands: Operands, eps: float, interpret: bool = False) -> tuple[jax.Array, KVCache]:
    """As the package's contract says."""
    q, k, v, cache, layer, kv_slots, rope, q_norm, k_norm = operands
    tokens, q_heads, head_dim = q.shape
    kv_heads, count = cache.kv_heads, cache.num_pages * cache.page_size
    half = rope[0].shape[-1]
    lanes, rest = pl.next_power_of_2(half), head_dim - 2 * half
    tail = pl.next_power_of_2(max(1, rest))
    pages = cache.pages.reshape(-1, 2 * kv_heads, head_dim)
    flat_rope = [angle.reshape(tokens, half) for angle in rope]
    norms = [(norm[0], jnp.asarray(norm[1], jnp.int32).reshape(1)) for norm in (q_norm, k_norm) if norm is not None]

    def kernel(q: Any, k: Any, v: Any, cos: Any, sin: Any, kv_slots: Any, layer: Any, *refs: Any) -> None:
        *norm_refs, _before, out, pages = refs
        token, head = pl.program_id(0), pl.program_id(1)
        lane, end = lax.iota(jnp.int32, lanes), lax.iota(jnp.int32, tail)
        parts = [(lane, lane < half), (lane + half, lane < half)]
        parts += [(end + 2 * half, end < rest)] if rest else []
        slot = kv_slots[token]
        row = layer[0] * count + slot

        def rotated(ref: Any, index: Any, norm: Any) -> Any:
            values = [compat.triton_load(ref.at[token, index, at], mask=mask, other=0.0) for at, mask in parts]
            if norm is not None:
                weights, item = norm
                scale = lax.rsqrt(sum(jnp.sum(x * x) for x in values) / head_dim + eps)
                vector = [compat.triton_load(weights.at[item[0], at], mask=mask, other=0.0) for at, mask in parts]
                values = [x * scale * w for x, w in zip(values, vector, strict=True)]
            c, s = (compat.triton_load(angle.at[token, lane], mask=lane < half, other=0.0) for angle in (cos, sin))
            first, second, *unturned = values
            return [first * c - second * s, second * c + first * s, *unturned]

        def store(ref: Any, index: Any, values: Any) -> None:
            for x, (at, mask) in zip(values, parts, strict=True):
                compat.triton_store(ref.at[(*index, at)], x.astype(ref.dtype), mask=mask)

        given = iter((norm_refs[i], norm_refs[i + 1]) for i in range(0, len(norm_refs), 2))
        norm_of = [None if norm is None else next(given) for norm in (q_norm, k_norm)]

        @pl.when(head < q_heads)
        def _() -> None:
            store(out, (token, head), rotated(q, head, norm_of[0]))

        @pl.when((head >= q_heads) & (head < q_heads + kv_heads) & (slot >= 0))
        def _() -> None:
            store(pages, (row, 2 * (head - q_heads)), rotated(k, head - q_heads, norm_of[1]))

        @pl.when((head >= q_heads + kv_heads) & (slot >= 0))
        def _() -> None:
            index = head - q_heads - kv_heads
            values = [compat.triton_load(v.at[token, index, at], mask=mask, other=0.0) for at, mask in parts]
            store(pages, (row, 2 * index + 1), values)

    inputs = (q, k, v, *flat_rope, kv_slots, jnp.asarray(layer, jnp.int32).reshape(1), *(part for n in norms for part in n))
    out, pages = compat.triton_call(
        kernel,
        name="append",
        grid=(tokens, q_heads + 2 * kv_heads),
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(pages.shape, pages.dtype)],
        input_output_aliases={len(inputs): 1},
        num_warps=1,
        interpret=interpret,
    )(*inputs, pages)
    return out, KVCache(pages.reshape(cache.pages.shape), cache.scales, cache.dtype)
