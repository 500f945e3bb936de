"""All layers of a decoder in one call, if a backend has such a call: values between the products stay out of memory and a step
is one launch. Otherwise `backend_for` returns None and the layers are composed of the other operations.

Contract of `backend.decoder_layers(x, caches, kv_slots, tables, ropes, states, sequences, stacks, layers, mixers, shape,
record)`:

* `x` float32 [tokens, hidden]: the residual stream. `caches`, `kv_slots`, `tables`: for each pool of pages, as `KVCache.write`
  and paged_attention have them; the caches store one dtype, and the tables differ in `page_table` alone. `ropes`: as append's,
  for each rotation that there is. `states`, `sequences`: of layers with a gated delta net, as in delta_net (None if there are
  none); the sequences are those of the tables.
* `stacks`: the parameters, each `Stack` with one role and one format, for all layers that have it in that format.
* `layers`: for each layer a mapping from `ROLES` to the `Part` that the layer has: which stack, and the place in it. A layer
  with a router is a mixture of experts, with shared_gate also of one that every token goes through, times the sigmoid of the
  product with shared_router if it has that; any other has gate, up and down. `mixers`: what each layer attends to, or its
  state.
* a gated delta net has the matrices delta_qkv, delta_gate and delta_output, and delta_beta and delta_alpha, or both in
  delta_beta_alpha: for each key head the rows of beta, then of alpha, of its value heads. log_decay is delta_decay times the
  softplus of alpha + delta_time_bias, beta is a sigmoid. A head's result is normalized by delta_norm and multiplied by the silu
  of its gate.
* result: x after the last layer, float32 [tokens, hidden], without meaning for padding; the caches with this step's keys and
  values and the states, updated in place if they were donated; with `record` the experts int32 and weights float32 of each
  router, both [layers with a router, tokens, top_k], as in pallas_kernels.routing, else ().
* the result is that of the composition, with dtype "int8": queries, keys and values, beta and alpha in "int8x2", the router in
  float32. Row t depends on its sequence alone, bit for bit. There is no derivative here: see ferrum_jax.models.decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels import dispatch, native
from pallas_kernels.decoder_layers.parts import Attending, LayerShape, Part, Recurring, Stack
from pallas_kernels.native.tables import FLOAT_FORMAT, MATRICES, ROLES

__all__ = ["BACKENDS", "ROLES", "Attending", "LayerShape", "Part", "Recurring", "Stack", "backend_for"]


BACKENDS = (
    dispatch.Backend("native", native.refuses, lambda: native),
    dispatch.composed(
        "quantized_matmul", "swiglu", "grouped_matmul", "expert_ffn", "append", "paged_attention", "route", "delta_net"
    ),
)


def backend_for(
    stacks: Sequence[Stack],
    layers: Sequence[Mapping[str, Part]],
    hidden: int,
    shape: LayerShape,
    dtype: str,
    implementation: dispatch.Implementation = None,
    features: Sequence[str] = (),
) -> Any:
    """The functions of the backend that computes all these layers in one call, or None. features: what the layers need that
    this contract does not have, in addition to parameters of other roles."""
    unknown = {role for layer in layers for role in layer} - set(ROLES)
    used = [stacks[number] for number in {part.stack for layer in layers for role, part in layer.items() if role in MATRICES}]
    kinds = {(s.format, s.memory_layout) for s in used}
    kinds = {kind for kind in kinds if kind[0] != FLOAT_FORMAT} or kinds  # which others may have next to them
    sizes, features = (hidden, math.gcd(shape.head_dim, *shape.delta_dims), shape.kinds), (*features, *sorted(unknown))
    target = dispatch.target("decoder_layers", implementation)
    cases = [dispatch.Case("decoder_layers", target, *kind[:1], dtype, kind[1], sizes, features) for kind in sorted(kinds)]
    found = [dispatch.choose(case, BACKENDS) for case in cases]
    return found[0] if found and all(one is found[0] for one in found) else None
