"""Attention inside packed sequences, for training: there is no cache, and scores exist for one pair of tiles at a time.

Contract of `segment_attention(q, k, v, first, scale, window, sinks)`:

* `q` float32 [tokens, q_heads, head_dim], `k` [tokens, kv_heads, head_dim], `v` [tokens, kv_heads, value_dim]: the tokens of
  each sequence lie next to each other. q_heads is a multiple of kv_heads.
* `first` int32 [tokens]: the first token of each one's sequence; for padding `tokens`.
* token t sees the tokens max(first[t], t - window + 1) .. t; window 0: from first[t] on.
* `sinks` [q_heads] float32, or None: as in paged_attention.
* `arithmetic`: the dtype of the operands of products.
* result float32 [tokens, q_heads, value_dim]; rows of padding are zero.
* derivatives: with respect to q, k and v. The backward pass computes the scores again.

A tile of queries walks over the tiles of keys from the first one that any of its tokens sees to its own, so the time grows with
the lengths of the sequences and not with the batch. The derivative is a rule, because such a walk has none (arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch

_MASKED = -1e30  # finite, so that a row before its first visible key never computes inf - inf


class _Static(NamedTuple):
    scale: float
    window: int
    arithmetic: str
    tile: int


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    scale: float,
    window: int = 0,
    sinks: jax.Array | None = None,
    arithmetic: str = "float32",
) -> jax.Array:
    """Attention of each token to those before it in its sequence. See the module's contract.

    Raises:
      ValueError: if shapes do not fit.
    """
    tokens, heads, dim = q.shape
    if k.shape[:2] != v.shape[:2] or k.shape[::2] != q.shape[::2] or heads % k.shape[1] or first.shape != (tokens,):
        raise ValueError(f"segment_attention: q {q.shape}, k {k.shape}, v {v.shape} and first {first.shape} do not fit")
    tile = min(128 if dispatch.target().platform == "cpu" else 512, tokens)
    padding = -tokens % tile
    low = jnp.maximum(first, jnp.arange(tokens) - window + 1) if window else first
    low = jnp.pad(low.astype(jnp.int32), (0, padding), constant_values=tokens + padding)
    q, k, v = (jnp.pad(x, ((0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(len(q), k.shape[1], -1, dim).transpose(1, 2, 0, 3)  # [kv_heads, group, tokens, head_dim]
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    added = None if sinks is None else sinks.reshape(k.shape[0], -1)
    y = _attention(q, k, v, low, added, _Static(scale, window, arithmetic, tile))
    return y.transpose(2, 0, 1, 3).reshape(tokens + padding, heads, -1)[:tokens]


def _dot(equation: str, a: jax.Array, b: jax.Array, static: _Static) -> jax.Array:
    dtype = jnp.dtype(static.arithmetic)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, number: jax.Array, axis: int, static: _Static) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, number * static.tile, static.tile, axis)


def _scores(query: jax.Array, k: jax.Array, low: jax.Array, i: jax.Array, j: jax.Array, static: _Static) -> Any:
    """The scores of query tile i with key tile j, [kv_heads, group, tile, tile], and which of them are seen [tile, tile]."""
    inside = jnp.arange(static.tile)
    key, place = j * static.tile + inside, i * static.tile + inside
    visible = (key >= _cut(low, i, 0, static)[:, None]) & (key <= place[:, None])
    return _dot("hgqd,hkd->hgqk", query, _cut(k, j, 1, static), static) * static.scale, visible


def _nearest(low: jax.Array, i: jax.Array, static: _Static) -> jax.Array:
    """The first key tile that query tile i sees; i + 1 if it sees none."""
    return jnp.minimum(_cut(low, i, 0, static).min() // static.tile, i + 1)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, low: jax.Array, sinks: jax.Array | None, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """The result [kv_heads, group, tokens, value_dim], and the logarithm of each row's sum of exponentials."""
    kv_heads, group, tokens, _ = q.shape

    def tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        query = _cut(q, i, 2, static)

        def step(j: jax.Array, carry: Any) -> Any:
            best, total, out = carry
            scores, visible = _scores(query, k, low, i, j, static)
            scores = jnp.where(visible, scores, _MASKED)
            higher = jnp.maximum(best, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0.0)
            keep = jnp.exp(best - higher)
            update = _dot("hgqk,hkd->hgqd", weights, _cut(v, j, 1, static), static)
            return higher, total * keep + weights.sum(-1), out * keep[..., None] + update

        rows = kv_heads, group, static.tile
        best, total = jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
        if sinks is not None:
            best, total = jnp.broadcast_to(sinks[..., None], rows), total + 1
        start = best, total, jnp.zeros((*rows, v.shape[-1]), jnp.float32)
        best, total, out = lax.fori_loop(_nearest(low, i, static), i + 1, step, start)
        total = jnp.where(total == 0.0, 1.0, total)
        return out / total[..., None], best + jnp.log(total)

    outs, logs = lax.map(tile, jnp.arange(tokens // static.tile))
    return jnp.moveaxis(outs, 0, 2).reshape(kv_heads, group, tokens, -1), jnp.moveaxis(logs, 0, 2).reshape(q.shape[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, low: jax.Array, sinks: jax.Array | None, static: _Static) -> jax.Array:
    return _forward(q, k, v, low, sinks, static)[0]


def _kept(
    q: jax.Array, k: jax.Array, v: jax.Array, low: jax.Array, sinks: jax.Array | None, static: _Static
) -> tuple[jax.Array, Any]:
    out, logs = _forward(q, k, v, low, sinks, static)
    return out, (q, k, v, low, out, logs)


def _backward(static: _Static, kept: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, low, out, logs = kept
    delta = (dout * out).sum(-1)

    def tile(i: jax.Array, carry: Any) -> Any:
        dq, dk, dv = carry
        query, do, log, taken = (_cut(x, i, 2, static) for x in (q, dout, logs, delta))

        def step(j: jax.Array, inner: Any) -> Any:
            of_query, dk, dv = inner
            scores, visible = _scores(query, k, low, i, j, static)
            weights = jnp.where(visible, jnp.exp(scores - log[..., None]), 0.0)
            slope = _dot("hgqd,hkd->hgqk", do, _cut(v, j, 1, static), static)
            slope = weights * (slope - taken[..., None]) * static.scale
            of_query = of_query + _dot("hgqk,hkd->hgqd", slope, _cut(k, j, 1, static), static)
            dk = _added(dk, j, _dot("hgqk,hgqd->hkd", slope, query, static))
            return of_query, dk, _added(dv, j, _dot("hgqk,hgqd->hkd", weights, do, static))

        of_query, dk, dv = lax.fori_loop(_nearest(low, i, static), i + 1, step, (jnp.zeros_like(query), dk, dv))
        return lax.dynamic_update_slice_in_dim(dq, of_query, i * static.tile, 2), dk, dv

    def _added(x: jax.Array, number: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, _cut(x, number, 1, static) + part, number * static.tile, 1)

    zeros = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    return *lax.fori_loop(0, q.shape[2] // static.tile, tile, zeros), None, None


_attention.defvjp(_kept, _backward)
