"""Ragged batches over a paged cache, the exact attention, and bounds for rounding: for the tests of every backend."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import KVCache, Tables

LAYER = 1  # that is written and attended to, of two

# Half an ulp, relative: of the queries and of the softmax weights as operands of the kernels' products.
HALF_ULPS = {
    "float32": (0.0, 0.0),
    "bfloat16": (2.0**-8, 2.0**-8),
    "float16": (2.0**-11, 2.0**-11),
    "int8": (2.0**-11, 2.0**-8),
    "float8_e4m3fn": (2.0**-11, 2.0**-11),
}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x [..., head_dim] as rounded by a cache of the dtype: float64."""
    if dtype == "int8":
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        return np.rint(x / np.where(scale == 0, np.float32(1), scale)).astype(np.float64) * scale
    return x.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float64)


def poisoned(cache: KVCache) -> KVCache:
    """Every element NaN (of int8 every scale)."""
    if cache.scales is not None:
        return dataclasses.replace(cache, pages=cache.pages + 127, scales=cache.scales + jnp.nan)
    nan = np.full((), np.nan, jnp.dtype(cache.dtype)).view(cache.pages.dtype)
    return dataclasses.replace(cache, pages=jnp.full_like(cache.pages, nan))


def case(
    queries,
    contexts,
    *,
    heads=(4, 2),
    head_dim=48,
    page_size=16,
    dtype="float32",
    target=None,
    padding=0,
    seed=3,
    value_dim=None,
):
    """(q, cache, tables, keys, values): `queries[s]` new tokens at the end of a sequence of `contexts[s]`.

    Pages are in random order, pages that no sequence has hold NaN, and entries of the table beyond a sequence are not numbers
    of pages. keys and values float64 [all positions, kv_heads, head_dim] are what the cache should hold. `padding`: tokens
    after the last sequence, NaN. `target`: decides how the cache is stored. `value_dim`: of a latent cache.
    """
    rng = np.random.default_rng(seed)
    q_heads, kv_heads = heads
    needed = [-(-context // page_size) for context in contexts]
    pool = sum(needed) + 3
    order = rng.permutation(pool)
    table = rng.choice([-1, -(2**31), 2**31 - 1, pool], (len(contexts), max(needed) + 1)).astype(np.int32)
    for s, count in enumerate(needed):
        table[s, :count], order = order[:count], order[count:]
    k, v = rng.standard_normal((2, sum(contexts), kv_heads, head_dim)).astype(np.float32)
    places = [table[s][np.arange(c) // page_size] * page_size + np.arange(c) % page_size for s, c in enumerate(contexts)]
    with dispatch.on(target or dispatch.Target("cpu")):
        cache = poisoned(KVCache.empty(2, pool, page_size, kv_heads, head_dim, dtype, value_dim is not None))
    written = jnp.asarray(k), None if value_dim is not None else jnp.asarray(v)
    cache = cache.write(LAYER, jnp.asarray(np.concatenate(places), jnp.int32), *written)
    tokens = sum(queries) + padding
    q = rng.standard_normal((tokens, q_heads, head_dim)).astype(np.float32)
    q[sum(queries) :] = np.nan
    positions = np.zeros(tokens, np.int32)
    positions[: sum(queries)] = np.concatenate([np.arange(c - n, c) for n, c in zip(queries, contexts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tables = Tables(*map(jnp.asarray, (positions, starts, np.asarray(contexts, np.int32), table)))
    held = rounded(k, dtype)
    return jnp.asarray(q), cache, tables, held, held[..., :value_dim] if value_dim else rounded(v, dtype)


def expected(q, queries, contexts, keys, values, window=0, half_ulps=(0.0, 0.0), sinks=None) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64, [tokens, q_heads, value_dim]; rows after the last sequence are zero. And how far a kernel may
    be from it with queries and weights rounded by `half_ulps`, relative, and all sums in float32. sinks [q_heads]: scores of
    one more position for each head, whose value is zero.

    A weight exp(score) is off by its score's error: half an ulp of q times sum |q k| / sqrt(head_dim), and the sum's own;
    and by its rounding. A result moves by the mean of |value - result| times that. float32: 2^-24 times sqrt(terms).
    """
    y, bound = np.zeros((2, *q.shape[:2], values.shape[-1]))
    token, start, group, eps = 0, 0, q.shape[1] // keys.shape[1], 2.0**-24
    q, scale = np.asarray(q, np.float64), q.shape[-1] ** -0.5
    of_query, of_weight = half_ulps
    for n, context in zip(queries, contexts, strict=True):
        k, v = (np.repeat(x[start : start + context], group, axis=1) for x in (keys, values))
        for position in range(context - n, context):
            low = max(0, position - window + 1) if window else 0
            seen, held = k[low : position + 1], v[low : position + 1]
            if sinks is not None:
                seen, held = (np.concatenate([x, np.zeros_like(x[:1])]) for x in (seen, held))
            scores = np.einsum("hd,phd->hp", q[token], seen) * scale
            if sinks is not None:
                scores[:, -1] = sinks
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y[token] = np.einsum("hp,phd->hd", weights, held)
            sizes = np.einsum("hd,phd->hp", np.abs(q[token]), np.abs(seen)) * scale
            of_score = (of_query + (q.shape[-1] ** 0.5 + 4) * eps) * sizes.max(-1)[:, None]
            spread = np.einsum("hp,phd->hd", weights, np.abs(held - y[token]))
            size = np.einsum("hp,phd->hd", weights, np.abs(held))
            sums = (len(seen) ** 0.5 + 16) * eps
            bound[token] = 1.1 * of_score * spread + (of_weight + sums) * (spread + size)
            token += 1
        start += context
    return y, bound
