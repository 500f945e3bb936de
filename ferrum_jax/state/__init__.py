"""What sequences have read, as one donated value: pages of keys and values, with a pool for each kind of attention layer, and
the states of layers that recur."""

from ferrum_jax.state.decode_state import (
    DecodeState,
    bytes_per_token,
    copy_places,
    grow,
    kv_dtype,
    new_cache,
    new_state,
    read_places,
    state_axes,
    widened,
    write_places,
)
from ferrum_jax.state.kinds import PageKind, RecurrentKind, kind_names, kv_layers, page_kinds, recurrent_kinds
from pallas_kernels.paged_attention import KV_DTYPES, KVCache

__all__ = [
    "KV_DTYPES",
    "DecodeState",
    "KVCache",
    "PageKind",
    "RecurrentKind",
    "bytes_per_token",
    "copy_places",
    "grow",
    "kind_names",
    "kv_dtype",
    "kv_layers",
    "new_cache",
    "new_state",
    "page_kinds",
    "read_places",
    "recurrent_kinds",
    "state_axes",
    "widened",
    "write_places",
]
