"""What `append` is given, as one value: its backends and its reference take it whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from pallas_kernels.paged_attention import KVCache

Norm = tuple[jax.Array, Any] | None


class Operands(NamedTuple):
    """As the package's contract says."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    cache: KVCache
    layer: jax.Array | int
    kv_slots: jax.Array
    rope: tuple[jax.Array, jax.Array]
    q_norm: Norm
    k_norm: Norm
