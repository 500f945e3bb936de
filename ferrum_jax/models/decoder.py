"""One decoder for LLaMA, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE, over the flat ragged token axis.

What differs between the families is in the configuration and in which parameters a file has: biases (Qwen2), norms of
queries and keys (Qwen3), experts. Layers are scanned by index: the stacks stay whole and only a counter moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import ModelConfig
from ferrum_jax.kv_cache import KVCache
from ferrum_jax.models.layers import Block
from ferrum_jax.models.rope import rope_angles
from ferrum_jax.models.segments import Segment, segments
from ferrum_jax.quantized import Layer, LayerStack, QuantizedTensor, linear
from pallas_kernels.paged_attention import Tables, make_plan
from pallas_kernels.reductions import rms_norm


class RaggedBatch(NamedTuple):
    """Tokens of several sequences one after the other; decode, prefill chunks and mixtures alike. All int32.

    tokens, positions [T]; slots [T]: where each token's KV goes, page * page_size + offset, -1 for padding;
    query_starts [S + 1]: tokens of sequence s are query_starts[s] .. query_starts[s + 1] - 1; kv_lengths [S]: cached
    tokens of the sequence, these included; page_table [S, P]; logits_rows [R]: the tokens whose logits are wanted.
    """

    tokens: jax.Array
    positions: jax.Array
    slots: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array
    logits_rows: jax.Array


class Decoder(nn.Module):
    """Parameters: `embedding` [vocab, hidden], `unembedding` (absent where tied to the embedding), `final_norm`
    [hidden], `rope_factors` (optional) and `layers`, a tree of `LayerStack`s."""

    config: ModelConfig

    def hidden(self, cache: KVCache, batch: RaggedBatch) -> tuple[jax.Array, KVCache]:
        """The last layer's output, normed: float32 [T, hidden_size], and the cache with this batch written."""
        with jax.named_scope("embedding"):
            x: jax.Array = self.get_variable("params", "embedding").gather(batch.tokens)
        rope = rope_angles(self.config, batch.positions, self.get_variable("params", "rope_factors"))
        tables = Tables(batch.positions, batch.query_starts, batch.kv_lengths, batch.page_table)
        plan = make_plan(tables, cache, self.config.num_heads, self.config.sliding_window)
        layers, block = self.variables["params"]["layers"], Block(self.config, parent=None)
        for segment in layer_segments(self.variables["params"]):

            def body(carry, step, segment=segment):
                for offset in range(segment.period):
                    layer = Layer(segment.start + offset, segment.period, step)
                    carry = block.apply({"params": layers}, *carry, layer, batch.slots, plan, rope)
                return carry, None

            if segment.repeats == 1:
                (x, cache), _ = body((x, cache), 0)
            else:
                (x, cache), _ = lax.scan(body, (x, cache), jnp.arange(segment.repeats, dtype=jnp.int32))
        return rms_norm(x, self.get_variable("params", "final_norm"), self.config.rms_norm_eps), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, hidden_size] -> float32 [R, vocab_size]."""
        matrix: QuantizedTensor = self.get_variable("params", "unembedding") or self.get_variable("params", "embedding")
        with jax.named_scope("unembedding"):
            return linear(hidden.astype(self.config.activations), matrix, arithmetic=self.config.dtype)

    def __call__(self, cache: KVCache, batch: RaggedBatch) -> tuple[jax.Array, KVCache]:
        hidden, cache = self.hidden(cache, batch)
        return self.logits(hidden[batch.logits_rows]), cache


def layer_segments(params: Mapping[str, Any]) -> tuple[Segment, ...]:
    """How the layers of these parameters are scanned; the sum of the periods is the number of distinct bodies."""
    stacks = jax.tree.leaves(params["layers"], is_leaf=lambda node: isinstance(node, LayerStack | QuantizedTensor))
    return segments(list(zip(*(stack.layout for stack in stacks), strict=True)))
