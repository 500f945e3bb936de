"""Paged attention on TPU: the ragged paged attention kernel of jax's library, on the cache without a copy.

For the kernel the pool of all layers is one run of pages, and a layer is an offset to the page numbers, so nothing is sliced.
The kernel cannot handle sequences without queries or without cached tokens: the former go to the end of the list, the latter
are read as if they had a page, and their rows are set to zero afterwards.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.dispatch import Case
from pallas_kernels.paged_attention.cache import KVCache

if TYPE_CHECKING:
    from pallas_kernels.paged_attention import AttentionMetadata, Tables

KV_BLOCK = 512  # positions fetched and summed together
_SMEM_ENTRIES = 224 * 1024  # of a page table; SMEM has 1 MiB in total
_PACKING = {"float32": 1, "bfloat16": 2, "float8_e4m3fn": 4}  # elements per 32-bit word


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.format not in _PACKING:
        what = {"int8": "int8 with a scale for each token", "float16": "float16 (Mosaic has no float16 loads)"}
        return f"does not read {what.get(case.format, case.format)}"
    _, sequences, max_pages, _, kv_heads, head_dim, page_size = case.shape
    if head_dim != 128:
        return f"head_dim {head_dim}; 128 only"
    words, rest = divmod(2 * kv_heads, _PACKING[case.format])
    if rest or (words not in (1, 2, 4) and words % 8):
        return f"{kv_heads} KV heads of {case.format} do not fill whole tiles"
    if (entries := sequences * _whole_blocks(max_pages, page_size)) > _SMEM_ENTRIES:
        return f"a page table of {entries} entries; {_SMEM_ENTRIES} at most (larger pages make it smaller)"
    return None


class Work(NamedTuple):
    """The tables in the kernel's form, int32: sequences with queries first, pages in range and in whole blocks.

    present [1]: how many have queries; live bool [tokens]: whether the row belongs to a sequence with cached tokens.
    """

    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array
    present: jax.Array
    live: jax.Array


def prepare(tables: Tables, cache: KVCache, q_heads: int, window: int) -> Work:
    """The arguments are those of `make_metadata`."""
    queries = jnp.diff(tables.query_starts)
    order = jnp.argsort(queries == 0, stable=True)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(queries[order]).astype(jnp.int32)])
    lengths = jnp.maximum(tables.kv_lengths, queries)[order]
    max_pages = tables.page_table.shape[1]
    pages = jnp.clip(tables.page_table[order], 0, cache.num_pages - 1)
    pages = jnp.pad(pages, ((0, 0), (0, _whole_blocks(max_pages, cache.page_size) - max_pages)))
    token = jnp.arange(tables.positions.shape[0])
    owner = jnp.searchsorted(tables.query_starts, token, side="right") - 1
    live = (token < tables.query_starts[-1]) & (tables.kv_lengths[owner] > 0)
    return Work(starts, lengths, pages, (queries > 0).sum(dtype=jnp.int32)[None], live)


@functools.partial(jax.jit, static_argnames=("scale",), inline=True)
def attention(
    q: jax.Array, cache: KVCache, layer: jax.Array, metadata: AttentionMetadata, scale: float, sinks: None = None
) -> jax.Array:
    """float32 [tokens, q_heads, head_dim]. See the package's contract; without sinks."""
    work: Work = metadata.work
    exact = cache.dtype == "float32"
    eight_bit = cache.pages.dtype.itemsize == 1
    tokens, sequences = q.shape[0], work.lengths.shape[0]
    out = compat.ragged_paged_attention(
        q.astype(jnp.float32 if exact else jnp.bfloat16),
        cache.pages.reshape(-1, *cache.pages.shape[2:]),
        work.lengths,
        work.pages + layer * cache.num_pages,
        work.starts,
        work.present,
        sm_scale=scale,
        sliding_window=metadata.window or None,
        k_scale=1.0 if eight_bit else None,
        v_scale=1.0 if eight_bit else None,
        num_kv_pages_per_block=_pages_a_block(cache.page_size),
        num_queries_per_block=8 if tokens <= sequences else 32,
        precision="highest" if exact else "default",
    )
    return jnp.where(work.live[:, None, None], out.astype(jnp.float32), 0.0)


def _pages_a_block(page_size: int) -> int:
    return max(1, KV_BLOCK // page_size)


def _whole_blocks(pages: int, page_size: int) -> int:
    block = _pages_a_block(page_size)
    return -(-pages // block) * block
