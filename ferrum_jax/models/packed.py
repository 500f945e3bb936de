"""The decoder over packed sequences, with an adapter and derivatives with respect to it: what training runs.

It is the same `Block`s; in place of a cache or state, mixers get where each token's sequence begins (`Packed`). What is kept
for the backward pass is the residual stream before each layer, float32 [layers, tokens, hidden_size]; everything inside a layer
is computed again. The weights stay in their blocks, and a layer's part of the adapter is a slice that the scan hands out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.config import Attention, ModelConfig
from ferrum_jax.models.decoder import Decoder, Params, ropes
from ferrum_jax.models.layers import TRAINED, Block, Packed
from ferrum_jax.models.scan import Sliced, scan_sliced
from ferrum_jax.quantized import Layer
from pallas_kernels.grouped_matmul import Pair
from pallas_kernels.reductions import rms_norm

Pairs = Mapping[str, Sliced]
"""Of an adapter, by the paths of matrices in a layer joined by dots: trees (A, B) as `Pair` has them, layers first."""


def hidden(
    params: Params, pairs: Pairs, scale: float, tokens: jax.Array, starts: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """The normalized output of the last layer.

    Args:
      params: the model's parameters.
      pairs: of the adapter, which adds scale x A^T B^T to each product.
      scale: of what the adapter adds.
      tokens: int32 [T], sequences one after the other.
      starts: int32 [S + 1]; sequence s is tokens starts[s] .. starts[s + 1] - 1, those from starts[S] on are padding.
      config: the model's configuration; static.

    Returns:
      float32 [T, hidden_size].
    """
    count, token = tokens.shape[0], jnp.arange(tokens.shape[0], dtype=jnp.int32)
    sequence = jnp.searchsorted(starts, token, side="right") - 1
    live = token < starts[-1]
    first = jnp.where(live, starts[sequence], count)
    positions = jnp.where(live, token - first, 0)
    decoder: Any = Decoder(config)
    x, inputs, angles = decoder.apply({"params": params}, tokens, positions, method="embedded")
    of_rope = dict(zip(ropes(config), angles, strict=True))
    layers = params["layers"]

    def step(x: jax.Array, layer: Layer, own: Any) -> jax.Array:
        spec = config.layers[layer.first]
        told = Packed(first, of_rope[spec.mixer.rope] if isinstance(spec.mixer, Attention) else None)

        @jax.checkpoint
        def block(x: jax.Array, own: Any) -> jax.Array:
            variables = {"params": layers, TRAINED: _by_module(own, scale)}
            return Block(config, spec, parent=None).apply(variables, x, None, layer, 0, told, live, None, inputs)[0]

        return block(x, own)

    x = scan_sliced(layers, pairs, step, x, config.layers)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def _by_module(own: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A layer's pairs as the collection of its modules."""
    tree: dict[str, Any] = {}
    for path, pair in own.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        if pair is not None:
            a, b = pair
            node[name] = Pair(a, b, scale)
    return tree
