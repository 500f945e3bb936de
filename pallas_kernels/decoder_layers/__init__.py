"""All layers of a decoder in one call, if a backend has such a call: values between the products stay out of memory and a step
is one launch. Otherwise `backend_for` returns None and the layers are composed of the other operations.

Contract of `backend.decoder_layers(x, caches, kv_slots, tables, ropes, stacks, layers, attending, shape, record)`:

* `x` float32 [tokens, hidden]: the residual stream. `caches`, `kv_slots`, `tables`: for each pool of pages, as `KVCache.write`
  and paged_attention have them; the caches store one dtype, and the tables differ in `page_table` alone. `ropes`: as append's,
  for each rotation that there is.
* `stacks`: the parameters, each `Stack` with one role and one format, for all layers that have it in that format.
* `layers`: for each layer a mapping from `ROLES` to the `Part` that the layer has: which stack, and the place in it. A layer
  with a router is a mixture of experts; any other has gate, up and down. `attending`: what each layer attends to.
* result: x after the last layer, float32 [tokens, hidden], without meaning for padding; the caches with this step's keys and
  values, updated in place if they were donated; with `record` the experts int32 and weights float32 of each router, both
  [layers with a router, tokens, top_k], as in pallas_kernels.routing, else ().
* the result is that of the composition, with dtype "int8": queries, keys and values in "int8x2", the router in float32. Row t
  depends on its sequence alone, bit for bit. There is no derivative here: see ferrum_jax.models.decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels import dispatch, native
from pallas_kernels.decoder_layers.parts import Attending, LayerShape, Part, Stack
from pallas_kernels.native.tables import ROLES, ROUTER_FORMAT, is_matrix

__all__ = ["BACKENDS", "ROLES", "Attending", "LayerShape", "Part", "Stack", "backend_for"]


BACKENDS = (
    dispatch.Backend("native", native.refuses, lambda: native),
    dispatch.composed("quantized_matmul", "swiglu", "grouped_matmul", "expert_ffn", "append", "paged_attention", "route"),
)


def backend_for(
    stacks: Sequence[Stack],
    layers: Sequence[Mapping[str, Part]],
    hidden: int,
    shape: LayerShape,
    dtype: str,
    implementation: dispatch.Implementation = None,
) -> Any:
    """The functions of the backend that computes all these layers in one call, or None."""
    unknown = {role for layer in layers for role in layer} - set(ROLES)
    matrices = {(role, part.stack) for layer in layers for role, part in layer.items() if is_matrix(role)}
    named = ((role, stacks[number]) for role, number in matrices)
    kinds = {(stack.format, stack.memory_layout) for role, stack in named if (role, stack.format) != ("router", ROUTER_FORMAT)}
    sizes = (hidden, shape.head_dim, len(unknown), shape.kinds)
    target = dispatch.target("decoder_layers", implementation)
    cases = [dispatch.Case("decoder_layers", target, *kind[:1], dtype, kind[1], sizes) for kind in sorted(kinds)]
    found = [dispatch.choose(case, BACKENDS) for case in cases]
    return found[0] if found and all(one is found[0] for one in found) else None
