"""Attention of a ragged batch of queries over a paged KV cache.

Contract of `paged_attention(q, cache, layer, metadata, scale, sinks)`:

* `q` [tokens, q_heads, head_dim] float32: the queries of all sequences, one after the other.
* `cache`: a `KVCache` with kv_heads heads that already holds this step's keys and values; q_heads is a multiple of kv_heads.
* `layer`: int32 scalar. `metadata`: from `make_metadata(tables, ...)`, once per step for all its layers.
* Query t of sequence s sees positions max(0, p - window + 1) .. p of its sequence, p = positions[t]; window 0 sees all.
* `sinks` [q_heads] float32, or None: one more score for each head, not scaled, of a position whose value is zero
  (arXiv 2508.10925).
* With a latent cache the value of a position is the first `value_dim` (of `make_metadata`) numbers of its key; else value_dim
  is head_dim.
* result [tokens, q_heads, value_dim] float32; rows of no sequence, or of one with kv_length 0, are zero.
* derivatives: with respect to q and sinks, and to the cache if it holds floats.

Sums run over fixed ranges of positions in order, so a row depends on that row, its sequence and its length alone; on CPU bit
for bit. Pages beyond a sequence's length never affect a result, whatever they hold, and their entries in the page table may be
any number. Lengths are not limited.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.cache import KV_DTYPES, KVCache, bytes_per_token, storage_dtype

__all__ = [
    "BACKENDS",
    "KV_DTYPES",
    "AttentionMetadata",
    "KVCache",
    "Tables",
    "bytes_per_token",
    "make_metadata",
    "paged_attention",
    "storage_dtype",
]

LATENT = "values inside the keys"
BACKENDS = (
    dispatch.kernels("triton", __name__, "gpu", features=("sinks",)),
    dispatch.kernels("mosaic_tpu", __name__, "tpu"),
    dispatch.Backend("xla", lambda case: None, lambda: xla, features=("sinks", LATENT)),
)


Sinks = jax.Array | None


class Tables(NamedTuple):
    """Which query belongs to which sequence and where that sequence's pages are. All int32.

    Attributes:
      positions: [tokens], of each query in its sequence.
      query_starts: [sequences + 1]; queries of s are query_starts[s] .. query_starts[s + 1] - 1, and they are its last ones:
        the last of them has position kv_lengths[s] - 1.
      kv_lengths: [sequences], cached tokens, including this step's; 0: there is no such sequence.
      page_table: [sequences, max_pages].
    """

    positions: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """A step's tables, what the backend prepared from them, and the backend itself."""

    tables: Tables
    work: Any
    window: int = dataclasses.field(metadata={"static": True})
    sinks: bool = dataclasses.field(metadata={"static": True})
    value_dim: int = dataclasses.field(metadata={"static": True})
    target: dispatch.Target = dataclasses.field(metadata={"static": True})
    backend: Any = dataclasses.field(metadata={"static": True})


def make_metadata(
    tables: Tables,
    cache: KVCache,
    q_heads: int,
    window: int = 0,
    implementation: dispatch.Implementation = None,
    *,
    sinks: bool = False,
    value_dim: int | None = None,
) -> AttentionMetadata:
    """Chooses the backend for batches of these shapes and lets it prepare the tables, once per step for all its layers.

    Args:
      tables: of the step.
      cache: that will be read.
      q_heads: heads of the queries.
      window: positions a query sees, including its own; 0 for all.
      implementation: the backend to take instead of the first that can.
      sinks: whether `paged_attention` will be given some.
      value_dim: of a latent cache, how many numbers of a key are its value.

    Raises:
      ValueError: if the cache and value_dim do not fit, or the forced backend cannot serve the case.
    """
    if cache.is_latent != (value_dim is not None) or not 0 < (value_dim or 1) <= cache.head_dim:
        raise ValueError(f"paged_attention: value_dim {value_dim} and a cache {cache.pages.shape} do not fit")
    target = dispatch.target("paged_attention", implementation)
    shape = (*tables.positions.shape, *tables.page_table.shape, q_heads, cache.kv_heads, cache.head_dim, cache.page_size)
    features = (*(("sinks",) if sinks else ()), *((LATENT,) if cache.is_latent else ()))
    case = dispatch.Case("paged_attention", target, cache.dtype, "float32", shape=shape, features=features)
    backend = dispatch.choose(case, BACKENDS)
    work = backend.prepare(tables, cache, q_heads, window)
    return AttentionMetadata(tables, work, window, sinks, value_dim or cache.head_dim, target, backend)


def paged_attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array | int,
    metadata: AttentionMetadata,
    scale: float,
    sinks: Sinks = None,
) -> jax.Array:
    """Attention over the pages of a layer. See the module's contract.

    Args:
      q: float32 [tokens, q_heads, head_dim].
      cache: already holds this step's keys and values.
      layer: int32 scalar.
      metadata: from `make_metadata`.
      scale: factor of the scores.
      sinks: float32 [q_heads].

    Returns:
      float32 [tokens, q_heads, value_dim].

    Raises:
      ValueError: if the heads of q, of the cache and the sinks do not fit.
    """
    if q.shape[-1] != cache.head_dim or q.shape[-2] % cache.kv_heads:
        raise ValueError(f"paged_attention: q {q.shape} and a cache {cache.pages.shape} do not fit")
    if metadata.sinks != (sinks is not None) or (sinks is not None and sinks.shape != q.shape[1:2]):
        given = "none" if sinks is None else sinks.shape
        raise ValueError(f"paged_attention: sinks: {given} with q {q.shape} and make_metadata(sinks={metadata.sinks})")
    return _attention(q, cache, jnp.asarray(layer, jnp.int32), metadata, scale, sinks)


def _reference(
    q: jax.Array, cache: KVCache, layer: jax.Array, metadata: AttentionMetadata, scale: float, sinks: Sinks
) -> jax.Array:
    metadata = dataclasses.replace(metadata, work=xla.prepare(metadata.tables, cache, q.shape[1], metadata.window))
    return xla.attention(q, cache, layer, metadata, scale, sinks, differentiable=True)  # with loops of a known length


@derivative_of(_reference, of=("q", "cache", "sinks"), static=("scale",))
def _attention(
    q: jax.Array, cache: KVCache, layer: jax.Array, metadata: AttentionMetadata, scale: float, sinks: Sinks
) -> jax.Array:
    return metadata.backend.attention(q, cache, layer, metadata, scale, sinks)
