"""The KV cache of a model: pages of keys and values as one donated value."""

from __future__ import annotations

from jax import export
from jax.typing import DTypeLike

from ferrum_jax import checks
from ferrum_jax.config import ModelConfig
from ferrum_jax.units import shown_dtype
from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import KV_DTYPES, KVCache

__all__ = ["KV_DTYPES", "KVCache", "bytes_per_token", "kv_dtype", "new_cache"]


def kv_dtype(dtype: DTypeLike) -> str:
    """JAX's name of a KV dtype, one of KV_DTYPES; users write "fp8" for float8_e4m3fn. ValueError for anything else."""
    name = "float8_e4m3fn" if isinstance(dtype, str) and dtype == "fp8" else checks.dtype_name(dtype)
    if name not in KV_DTYPES:
        raise ValueError(f"kv_dtype {dtype!r} is not supported; supported: {', '.join(map(shown_dtype, KV_DTYPES))}")
    return name


def bytes_per_token(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of one token's keys and values in all layers, scales included."""
    return config.num_layers * paged_attention.bytes_per_token(kv_dtype(dtype), config.num_kv_heads, config.head_dim)


def new_cache(config: ModelConfig, *, num_pages: int, page_size: int = 16, dtype: DTypeLike = "float32") -> KVCache:
    """An empty cache.

    Args:
      config: of the model.
      num_pages: pages; page p has the slots p * page_size to (p + 1) * page_size - 1.
      page_size: tokens of a page.
      dtype: float32, bfloat16, float16, int8 (one scale for each token and head) or float8_e4m3fn ("fp8").

    Raises:
      ValueError: for another dtype, and for a cache without pages or tokens.
    """
    dtype = kv_dtype(dtype)
    if num_pages < 1 or page_size < 1:
        raise ValueError(f"a cache needs at least one page and one token a page, not {num_pages} and {page_size}")
    return KVCache.empty(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, dtype)


export.register_pytree_node_serialization(
    KVCache,
    serialized_name="ferrum_jax.KVCache",
    serialize_auxdata=lambda static: static[0].encode(),
    deserialize_auxdata=lambda data: (data.decode(),),
)
