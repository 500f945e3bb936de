"""Paged attention in plain XLA: query tiles x KV tiles with the online softmax.

Queries of one sequence are cut into tiles of `_query_tile` rows; a few tiles at a time walk over the KV in tiles of `KV_TILE`
positions, aligned to position 0, and stop at the longest of them. A KV tile that a row does not see leaves its sums unchanged,
bit for bit, so neither other rows nor the length of the walk affect a row's result. Where there are sinks, a row begins as if
it had seen one position, with the sink as its score and zeros as its value.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.cache import KVCache
from pallas_kernels.reductions import exp, row_sum, term

if TYPE_CHECKING:
    from pallas_kernels.paged_attention import AttentionMetadata, Sinks, Tables

KV_TILE = 128
_MASKED = -1e30  # finite, so that a row before its first visible position never computes inf - inf


class Work(NamedTuple):
    """Which queries share a tile, what each of them sees and where results go.

    rows [tiles, size]: the token at each place of each tile; seen_from, seen_until [tiles, size]: the positions it sees (none
    if the place has no query); pages [tiles, ...]: the page table of the tile's sequence, in whole KV tiles; place [tokens]:
    where each token's result is among tiles * size, or -1.
    """

    rows: jax.Array
    seen_from: jax.Array
    seen_until: jax.Array
    pages: jax.Array
    place: jax.Array


def prepare(tables: Tables, cache: KVCache, q_heads: int, window: int) -> Work:
    """Cuts the queries into tiles. The arguments are those of `make_metadata`."""
    tokens = tables.positions.shape[0]
    sequences, max_pages = tables.page_table.shape
    size = _query_tile(tokens, sequences)
    tiles = min(tokens, tokens // size + sequences)
    tiles = math.ceil(tiles / _together(size, tiles)) * _together(size, tiles)
    starts = tables.query_starts
    ends = jnp.cumsum(-(-jnp.diff(starts) // size))
    before = jnp.concatenate([jnp.zeros((1,), ends.dtype), ends[:-1]])

    tile = jnp.arange(tiles)
    owner = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), sequences - 1)
    rows = starts[owner][:, None] + (tile - before[owner])[:, None] * size + jnp.arange(size)
    live = (rows < starts[owner + 1][:, None]) & (tile < ends[-1])[:, None]
    rows = jnp.clip(rows, 0, tokens - 1)
    seen_until = jnp.where(live, jnp.minimum(tables.positions[rows] + 1, tables.kv_lengths[owner][:, None]), 0)
    seen_from = jnp.maximum(tables.positions[rows] + 1 - window, 0) if window else jnp.zeros_like(seen_until)
    seen_from = jnp.where(live, seen_from, jnp.iinfo(jnp.int32).max)
    pages = jnp.pad(tables.page_table, ((0, 0), (0, -max_pages % _pages_a_tile(cache.page_size))))[owner]

    token = jnp.arange(tokens)
    sequence = jnp.clip(jnp.searchsorted(starts, token, side="right") - 1, 0, sequences - 1)
    offset = token - starts[sequence]
    place = (before[sequence] + offset // size) * size + offset % size
    return Work(rows, seen_from, seen_until, pages, jnp.where(token < starts[-1], place, -1))


@functools.partial(jax.jit, static_argnames=("scale", "differentiable"), inline=True)
def attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    metadata: AttentionMetadata,
    scale: float,
    sinks: Sinks = None,
    *,
    differentiable: bool = False,
) -> jax.Array:
    """float32 [tokens, q_heads, value_dim]. `differentiable`: loops of static length over every KV tile of the table."""
    _, q_heads, head_dim = q.shape
    value_dim = metadata.value_dim
    page_size, kv_heads = cache.page_size, cache.kv_heads
    group = q_heads // kv_heads
    work: Work = metadata.work
    tiles, size = work.rows.shape
    pages_a_tile = _pages_a_tile(page_size)
    span = pages_a_tile * page_size
    kv_tiles = work.pages.shape[1] // pages_a_tile

    queries = (q.astype(jnp.float32) * scale)[work.rows].reshape(tiles, size, kv_heads, group, head_dim)
    queries = queries.transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, size * group, head_dim)
    if size * group == 1:  # products with one row get other bits
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 1), (0, 0)))
    if sinks is not None:  # [kv_heads, rows, 1], the rows as those of queries
        sinks = jnp.tile(sinks.reshape(kv_heads, 1, group), (1, queries.shape[2] // group, 1)).reshape(kv_heads, -1, 1)

    def walk(inputs: Any) -> Any:
        query, pages_of, low, high = inputs  # [w, kv_heads, r, head_dim], [w, pages], [w, size], [w, size]
        r = query.shape[2]
        low, high = (jnp.repeat(bound, group, axis=1) for bound in (low, high))
        low, high = (jnp.pad(b, ((0, 0), (0, r - size * group)), mode="edge")[:, None, :, None] for b in (low, high))
        nearest, longest = low.min(axis=(1, 2, 3))[:, None], high.max(axis=(1, 2, 3))[:, None]

        def step(i: jax.Array, carry: Any) -> Any:
            best, total, out = carry
            ids = lax.dynamic_slice_in_dim(pages_of, i * pages_a_tile, pages_a_tile, axis=1)
            position = i * span + jnp.arange(span)
            kv = cache.read(layer, ids).reshape(-1, span, kv_heads, cache.rows // kv_heads, head_dim)
            kv = jnp.where(((position >= nearest) & (position < longest))[..., None, None, None], kv, 0.0)
            k, v = kv[..., 0, :], kv[..., -1, :value_dim]  # [w, span, kv_heads, head_dim], and value_dim
            visible = (position >= low) & (position < high)
            # What is summed over is last in both operands: the bits of this form do not depend on the number of rows.
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)
            scores = jnp.einsum("whrd,whpd->whrp", query, k, precision=lax.Precision.HIGHEST)
            scores = jnp.where(visible, scores, _MASKED)
            new_best = jnp.maximum(best, scores.max(axis=-1, keepdims=True))
            weights = jnp.where(visible, exp(scores - new_best), 0.0)
            keep = exp(best - new_best)
            update = jnp.einsum("whrp,whdp->whrd", weights, v, precision=lax.Precision.HIGHEST)
            return new_best, term(total, keep) + row_sum(weights), term(out, keep) + update

        column = jnp.zeros((*query.shape[:3], 1), jnp.float32)
        first = 0 if differentiable else jnp.minimum(low.min(), high.max()) // span
        last = kv_tiles if differentiable else jnp.minimum(-(-high.max() // span), kv_tiles)
        nothing = (column + _MASKED, column) if sinks is None else (column + sinks, column + 1)
        zeros = jnp.zeros((*query.shape[:3], value_dim), jnp.float32)
        _, total, out = lax.fori_loop(first, last, step, (*nothing, zeros))
        return out / jnp.where(total == 0.0, 1.0, total)

    inputs = (queries, work.pages, work.seen_from, work.seen_until)
    out = lax.map(walk, tuple(a.reshape(-1, _together(size, tiles), *a.shape[1:]) for a in inputs))
    out = out.reshape(tiles, kv_heads, -1, value_dim)[:, :, : size * group]
    out = out.reshape(tiles, kv_heads, size, group, value_dim).transpose(0, 2, 1, 3, 4).reshape(-1, q_heads, value_dim)
    return jnp.where((work.place >= 0)[:, None, None], out[jnp.maximum(work.place, 0)], 0.0)


def _query_tile(tokens: int, sequences: int) -> int:
    """Rows per query tile: one for decode, up to 64 for prefill."""
    average = max(1, min(64, tokens // sequences))
    return 1 << (average - 1).bit_length()


def _together(size: int, tiles: int) -> int:
    """How many query tiles walk over the KV at the same time."""
    return min(max(1, 16 // size), tiles)


def _pages_a_tile(page_size: int) -> int:
    return max(1, KV_TILE // page_size)
