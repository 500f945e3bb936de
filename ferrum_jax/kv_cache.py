"""The device side of the KV cache: pages of keys and values as one donated value."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from ferrum_jax.config import ModelConfig
from pallas_kernels.paged_attention import write_pages

KV_DTYPES = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer: [layers, pages, page_size, kv_heads, head_dim].

    bfloat16 is kept as its bits in uint16: XLA on CPU would rewrite a whole bfloat16 array at every update.
    """

    k: jax.Array
    v: jax.Array

    @property
    def num_pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    def write(self, layer: jax.Array | int, slots: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        """Puts k and v [tokens, kv_heads, head_dim] at `slots` int32 [tokens] of a layer; slot -1 writes nowhere."""
        return KVCache(write_pages(self.k, layer, slots, k), write_pages(self.v, layer, slots, v))


def new_cache(config: ModelConfig, *, num_pages: int, page_size: int = 16, dtype: DTypeLike = "float32") -> KVCache:
    """An empty cache of `num_pages` pages of `page_size` tokens; `dtype` is float32, bfloat16 or float16."""
    with contextlib.suppress(TypeError):  # what is no dtype is named below
        dtype = jnp.dtype(dtype).name
    if dtype not in KV_DTYPES:
        raise ValueError(f"kv dtype {dtype!r} is not supported; supported: {', '.join(KV_DTYPES)}")
    if num_pages < 1 or page_size < 1:
        raise ValueError(f"a cache needs at least one page and one token a page, not {num_pages} and {page_size}")
    shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
    stored = jnp.uint16 if dtype == "bfloat16" else jnp.dtype(dtype)
    return KVCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored))


export.register_pytree_node_serialization(
    KVCache,
    serialized_name="ferrum_jax.KVCache",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: (),
)
