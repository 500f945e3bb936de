"""One decoder for LLaMA, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE, over the flat ragged token axis.

What differs between the families is in the configuration and in which parameters a file has: biases (Qwen2), norms of
queries and keys (Qwen3), experts. Layers are scanned by index: the stacks stay whole and only a counter moves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.adapters import COLUMNS, without_adapters
from ferrum_jax.config import ModelConfig
from ferrum_jax.models.layers import ROUTING, Block
from ferrum_jax.models.rope import rope_angles
from ferrum_jax.models.scan import scan_layers
from ferrum_jax.quantized import Layer, LayerStack, QuantizedTensor, linear
from ferrum_jax.state import DecodeState, KVCache
from pallas_kernels.decoder_layers import LayerShape, Part, Stack, backend_for
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.paged_attention import Tables, make_metadata
from pallas_kernels.reductions import rms_norm

Cache = KVCache | DecodeState  # of layers of one kind, or of several
Params = Mapping[str, Any]
Chosen = tuple[jax.Array, ...]  # experts and their weights, or nothing
Carry = tuple[jax.Array, KVCache, Chosen]


class RaggedBatch(NamedTuple):
    """Tokens of several sequences one after the other; decode, prefill chunks and mixtures alike. All int32.

    Attributes:
      tokens: [T], the ids.
      positions: [T], of each token in its sequence.
      slots: [T], where each token's KV goes: page * page_size + offset, -1 for padding.
      query_starts: [S + 1]; tokens of sequence s are query_starts[s] .. query_starts[s + 1] - 1.
      kv_lengths: [S], cached tokens of the sequence, these included.
      page_table: [S, P], the pages of each sequence in order.
      logits_rows: [R], the tokens whose logits are wanted.
      adapters: [T], each token's adapter by its place among those of the parameters, -1 for none; None: no token has one.
    """

    tokens: jax.Array
    positions: jax.Array
    slots: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array
    logits_rows: jax.Array
    adapters: jax.Array | None = None


class Decoder(nn.Module):
    """Parameters: `embedding` [vocab, hidden], `unembedding` (absent where tied to the embedding), `final_norm`
    [hidden], `rope_factors` (optional) and `layers`, a tree of `LayerStack`s; with adapters those of `adapters`.

    Where the collection `ROUTING` is mutable, "chosen" in it is the experts of every token, int32, and their weights,
    float32, both [layers with experts, T, top_k]; where it is not, nothing is recorded and the program is the same."""

    config: ModelConfig

    def hidden(self, state: Cache, batch: RaggedBatch) -> tuple[jax.Array, Cache]:
        """The last layer's output, normed: float32 [T, hidden_size], and the state with this batch written."""
        cache = state.pools[0] if isinstance(state, DecodeState) else state
        with jax.named_scope("embedding"):
            x: jax.Array = self.get_variable("params", "embedding").gather(batch.tokens)
        rope = rope_angles(self.config, batch.positions, self.get_variable("params", "rope_factors"))
        tables = Tables(batch.positions, batch.query_starts, batch.kv_lengths, batch.page_table)
        layers = self.variables["params"]["layers"]
        record = self.is_mutable_collection(ROUTING)
        if batch.adapters is None:
            plain = without_adapters(layers)
            x, cache, routing = run_layers(self.config, plain, x, cache, batch.slots, tables, rope, record)
        else:
            columns: jax.Array | None = self.get_variable("params", COLUMNS)
            if columns is None:
                raise ValueError("RaggedBatch.adapters: the parameters have no adapters; load the model with some")
            chosen = batch.adapters[:, None] == columns
            x, cache, routing = _composed(self.config, layers, x, cache, batch.slots, tables, rope, chosen, record)
        self.sow(ROUTING, "chosen", routing)
        state = DecodeState((cache,)) if isinstance(state, DecodeState) else cache
        return rms_norm(x, self.get_variable("params", "final_norm"), self.config.rms_norm_eps), state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, hidden_size] -> float32 [R, vocab_size]."""
        matrix: QuantizedTensor = self.get_variable("params", "unembedding") or self.get_variable("params", "embedding")
        with jax.named_scope("unembedding"):
            config, hidden = self.config, hidden.astype(self.config.activations)
            return linear(hidden, matrix, arithmetic=config.dtype, implementation=config.implementation)

    def __call__(self, state: Cache, batch: RaggedBatch) -> tuple[jax.Array, Cache]:
        hidden, state = self.hidden(state, batch)
        return self.logits(hidden[batch.logits_rows]), state


def run_layers(config: ModelConfig, layers: Params, x, cache: KVCache, slots, tables: Tables, rope, record=False) -> Carry:
    """The residual stream x float32 [T, hidden_size] after all layers, the cache and, with `record`, what the routers chose:
    in one call where a backend has one."""
    scale, normalize = config.expert_weights_scale, config.norm_topk_prob
    shape = LayerShape(config.head_dim, config.rms_norm_eps, config.sliding_window, config.experts_per_token, normalize, scale)
    parts = _parts(layers, config.num_layers)
    backend = backend_for(*parts, config.hidden_size, shape, config.dtype, config.implementation)
    if backend is None:
        return _composed(config, layers, x, cache, slots, tables, rope, record=record)

    @derivative_of(functools.partial(_composed, config, record=record))
    def together(layers, x, cache, slots, tables, rope):
        return backend.decoder_layers(x, cache, slots, tables, rope, *_parts(layers, config.num_layers), shape, record)

    with jax.named_scope("layers"):
        return together(layers, x, cache, slots, tables, rope)


def _parts(layers: Params, count: int) -> tuple[list[Stack], list[dict[str, Part]]]:
    """The stacks of all parameters, and which of them each layer has by the names of pallas_kernels.decoder_layers."""
    stacks: list[Stack] = []
    parts: list[dict[str, Part]] = [{} for _ in range(count)]
    for path, parameter in jax.tree.leaves_with_path(layers, is_leaf=lambda node: isinstance(node, LayerStack)):
        numbers = {format: len(stacks) + i for i, format in enumerate(parameter.stacks)}
        stacks += [Stack(tensor.planes[0], tensor.format, tensor.memory_layout) for tensor in parameter.stacks.values()]
        for layer in filter(parameter.has, map(Layer, range(count))):
            _, place = parameter.select(layer)
            parts[layer.first][path[-1].key] = Part(numbers[parameter.formats[layer.first]], place)
    return stacks, parts


def _composed(
    config: ModelConfig, layers: Params, x, cache: KVCache, slots, tables: Tables, rope, chosen=None, record: bool = False
) -> Carry:
    """The layers one after the other, each `Block` once a distinct body. chosen bool [T, columns]: as in `LayerModule`."""
    metadata = make_metadata(tables, cache, config.num_heads, config.sliding_window, config.implementation)
    block = Block(config, parent=None)

    def step(carry: Carry, layer: Layer) -> Carry:
        x, cache, routing = carry
        (x, cache), sown = block.apply({"params": layers}, x, cache, layer, slots, metadata, rope, chosen, mutable=[ROUTING])
        if routing and sown:
            (chose,) = sown[ROUTING]["feed_forward"]["chosen"]
            routing = tuple(known.at[layer.number].set(new) for known, new in zip(routing, chose, strict=True))
        return x, cache, routing

    of_layers = config.num_layers, slots.shape[0], config.experts_per_token
    routing = tuple(jnp.zeros(of_layers, dtype) for dtype in (jnp.int32, jnp.float32)) if record else ()
    x, cache, routing = scan_layers(layers, step, (x, cache, routing))
    return x, cache, tuple(known[np.asarray(config.expert_layers)] for known in routing)
