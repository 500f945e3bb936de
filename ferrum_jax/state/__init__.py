"""What sequences have read, as one donated value with kinds: pages of keys and values, a pool for each kind of layer."""

from ferrum_jax.state.decode_state import (
    DecodeState,
    bytes_per_token,
    copy_places,
    grow,
    kv_dtype,
    new_cache,
    new_state,
    read_places,
    write_places,
)
from ferrum_jax.state.kinds import PageKind, page_kinds
from pallas_kernels.paged_attention import KV_DTYPES, KVCache

__all__ = [
    "KV_DTYPES",
    "DecodeState",
    "KVCache",
    "PageKind",
    "bytes_per_token",
    "copy_places",
    "grow",
    "kv_dtype",
    "new_cache",
    "new_state",
    "page_kinds",
    "read_places",
    "write_places",
]
