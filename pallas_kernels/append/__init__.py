"""The step between a layer's projections and its attention: heads are normalized and rotated, keys and values cached.

Contract of `append(q, k, v, cache, layer, kv_slots, rope, q_norm, k_norm, eps)`:

* `q` [tokens, q_heads, head_dim], `k`, `v` [tokens, kv_heads, head_dim], float32, as projected.
* `rope`: cos and sin, float32 [tokens, 1, rope_dim / 2]: value i of a head turns with value i + rope_dim / 2, values from
  rope_dim on do not change (half-split layout; arXiv 2104.09864).
* `q_norm`, `k_norm`: None, or (weights float32 [n, head_dim], int32 scalar item): RMSNorm over each head before rotation
  with that item of the vectors, `eps` inside the root (arXiv 1910.07467).
* `cache`, `layer`, `kv_slots`: as `KVCache.write`; the cache is updated in place if it was donated.
* result: q normalized and rotated, float32, and the cache with k (normalized, rotated) and v written.
* derivatives: with respect to q, k, v, the norms and, if it holds floats, the cache.
"""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.append import xla
from pallas_kernels.append.operands import Norm, Operands
from pallas_kernels.append.xla import rotate, turned
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.paged_attention import KVCache

__all__ = ["BACKENDS", "Norm", "append", "rotate", "turned"]

BACKENDS = (dispatch.kernels("triton", __name__, "gpu"), dispatch.Backend("xla", lambda case: None, lambda: xla))


def append(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array | int,
    kv_slots: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    q_norm: Norm = None,
    k_norm: Norm = None,
    eps: float = 1e-6,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, KVCache]:
    """(q float32 [tokens, q_heads, head_dim], cache). See the module's contract.

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    kv = (q.shape[0], cache.kv_heads, cache.head_dim)
    if k.shape != kv or v.shape != kv or q.shape[-1] != cache.head_dim or kv_slots.shape != q.shape[:1]:
        raise ValueError(f"append: q {q.shape}, k {k.shape}, v {v.shape} and a cache {cache.pages.shape} do not fit")
    operands = Operands(q, k, v, cache, layer, kv_slots, rope, q_norm, k_norm)
    return _append(operands, eps, dispatch.target("append", implementation))


@derivative_of(lambda operands, eps, target: xla.append(operands, eps), static=("eps", "target"))
def _append(operands: Operands, eps: float, target: dispatch.Target) -> tuple[jax.Array, KVCache]:
    cache = operands.cache
    case = dispatch.Case("append", target, cache.dtype, "float32", shape=(*operands.q.shape, cache.kv_heads))
    return dispatch.choose(case, BACKENDS).append(operands, eps)
