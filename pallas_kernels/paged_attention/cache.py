"""The paged KV cache: keys and values of all layers in one donated array.

A token has K of head i in its row 2i and V in 2i + 1, so that a step is one scatter and a page is one run of bytes. A latent
cache (arXiv 2405.04434) has one row for a token, the key of a single head: its value is the beginning of the same row. The KV
dtype is the type of the elements; their storage may differ: where XLA would rewrite the whole array to update a part of it
(16-bit and 8-bit floats on CPU, 8-bit floats on GPU), their bits are stored as integers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
_BITS = {("bfloat16", "cpu"): "uint16", ("float8_e4m3fn", "cpu"): "uint8", ("float8_e4m3fn", "gpu"): "uint8"}
_E4M3_MAX = 448.0


def storage_dtype(dtype: str, target: dispatch.Target) -> jnp.dtype:
    """The dtype in which elements of a KV dtype are stored on the target."""
    return jnp.dtype(_BITS.get((dtype, target.platform), dtype))


def bytes_per_token(dtype: str, kv_heads: int, head_dim: int, latent: bool = False) -> int:
    """Bytes of one token's keys and values in one layer, scales included."""
    return _rows(kv_heads, latent) * (head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == "int8" else 0))


def _rows(kv_heads: int, latent: bool) -> int:
    """Of a token."""
    if latent and kv_heads != 1:
        raise ValueError(f"a latent cache has a single head, not {kv_heads}")
    return 1 if latent else 2 * kv_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Pages of keys and values. (A page's scales are one row because TPUs fill rows up to 128.)

    Attributes:
      pages: [layers, pages, page_size, rows, head_dim], rotated keys and values; rows is 2 * kv_heads, or 1: latent.
      scales: float32 [layers, pages, page_size * rows] if `dtype` is int8, else None: an element is its integer times its
        row's scale.
      dtype: of an element.
    """

    pages: jax.Array
    scales: jax.Array | None
    dtype: str = dataclasses.field(metadata={"static": True})

    @staticmethod
    def empty(
        layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: str, latent: bool = False
    ) -> KVCache:
        """Zeros, stored for the target being traced for. `dtype` is one of KV_DTYPES."""
        rows = _rows(kv_heads, latent)
        stored = jnp.zeros((layers, pages, page_size, rows, head_dim), storage_dtype(dtype, dispatch.target()))
        scales = jnp.zeros((layers, pages, page_size * rows), jnp.float32)
        return KVCache(stored, scales if dtype == "int8" else None, dtype)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[1]

    @property
    def page_size(self) -> int:
        return self.pages.shape[2]

    @property
    def rows(self) -> int:
        """Of a token."""
        return self.pages.shape[3]

    @property
    def is_latent(self) -> bool:
        return self.rows == 1

    @property
    def kv_heads(self) -> int:
        return 1 if self.is_latent else self.rows // 2

    @property
    def head_dim(self) -> int:
        return self.pages.shape[4]

    def write(self, layer: jax.Array | int, kv_slots: jax.Array, k: jax.Array, v: jax.Array | None) -> KVCache:
        """The cache with keys and values written. int8 is scaled by the largest of its row, fp8 saturates.

        Args:
          layer: which one.
          kv_slots: int32 [tokens], page * page_size + offset, all different; -1 writes nowhere.
          k: [tokens, kv_heads, head_dim].
          v: [tokens, kv_heads, head_dim]; None for a latent cache.
        """
        page, place = layer * self.num_pages + kv_slots // self.page_size, kv_slots % self.page_size
        # Rows that are not written get different pages beyond the end, so that all indices differ.
        nowhere = self.pages.shape[0] * self.num_pages + jnp.arange(kv_slots.shape[0], dtype=jnp.int32)
        page = jnp.where(kv_slots < 0, nowhere, page)

        def put(array: jax.Array, index: tuple, values: jax.Array) -> jax.Array:
            flat = array.reshape(-1, *array.shape[2:])
            return flat.at[index].set(values.astype(array.dtype), mode="drop", unique_indices=True).reshape(array.shape)

        values = k if v is None else jnp.stack([k, v], axis=2).reshape(-1, self.rows, self.head_dim)
        if self.scales is not None:
            values = values.astype(jnp.float32)
            scales = jnp.abs(values).max(axis=-1) / 127
            values = jnp.round(values / jnp.where(scales == 0, 1.0, scales)[..., None])
            columns = place[:, None] * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
            pages, scales = put(self.pages, (page, place), values), put(self.scales, (page[:, None], columns), scales)
            return KVCache(pages, scales, self.dtype)
        if self.dtype == "float8_e4m3fn":
            values = jnp.clip(values, -_E4M3_MAX, _E4M3_MAX)
        if self.pages.dtype != self.dtype:
            values = lax.bitcast_convert_type(values.astype(self.dtype), self.pages.dtype)
        return KVCache(put(self.pages, (page, place), values), None, self.dtype)

    def read(self, layer: jax.Array | int, ids: jax.Array) -> jax.Array:
        """The exact contents of pages of a layer.

        Args:
          layer: which one.
          ids: int32 [...], numbers of pages.

        Returns:
          float32 [..., page_size, rows, head_dim].
        """
        ids = layer * self.num_pages + jnp.clip(ids, 0, self.num_pages - 1)

        def get(array: jax.Array) -> jax.Array:
            return array.reshape(-1, *array.shape[2:]).at[ids].get(mode="clip")  # a single index: with two, TPUs copy the array

        stored = get(self.pages)
        if self.scales is not None:
            return stored.astype(jnp.float32) * get(self.scales).reshape(stored.shape[:-1])[..., None]
        if stored.dtype != self.dtype:
            stored = lax.bitcast_convert_type(stored, jnp.dtype(self.dtype))
        return stored.astype(jnp.float32)
