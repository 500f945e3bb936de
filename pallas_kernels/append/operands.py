"""The arguments of `append` as one value, for its backends and its reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from pallas_kernels.paged_attention import KVCache

Norm = tuple[jax.Array, Any] | None


class Operands(NamedTuple):
    """See the package's contract."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    cache: KVCache
    layer: jax.Array | int
    kv_slots: jax.Array
    rope: tuple[jax.Array, jax.Array]
    q_norm: Norm
    k_norm: Norm
