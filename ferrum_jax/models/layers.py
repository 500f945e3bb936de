"""The parts of a decoder layer: norm, attention, dense feed-forward, mixture of experts, the layer's own input.

Flax modules used purely. Each reads its own parameters, stacked over layers, and gets the `Layer` to compute and its part of
that layer's spec; the residual stream is float32, matrix products run in `config.dtype`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax import adapters
from ferrum_jax.config import Attention as AttentionSpec
from ferrum_jax.config import Dense, Latent, LayerSpec, Mixture, ModelConfig
from ferrum_jax.quantized import Layer, LayerStack, gated_linear, linear, linears, mixture, operand, tensor_of
from pallas_kernels.append import Norm, append, turned
from pallas_kernels.grouped_matmul import Clamp, ExpertAdapters, Pair
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.reductions import gelu, product, rms_norm, row_sum, sigmoid, silu
from pallas_kernels.routing import Router, route
from pallas_kernels.segment_attention import segment_attention

_PROJECTIONS = "gate", "up", "down"  # of an expert
Index = jax.Array | int  # of a layer in its part of the state
ROUTING = "routing"  # the Flax collection in which a mixture records its choice, if that is mutable
TRAINED = "trained"  # the Flax collection with the layer's part of an adapter that is being trained: a `Pair` for each matrix


class LayerModule(nn.Module):
    """A module whose parameters are `LayerStack`s.

    With `adapter_mask` bool [tokens, columns], which selects the columns of A x of each token's adapter, adapters are applied.
    One that is in the collection `TRAINED` is applied to all tokens instead, and results have derivatives with respect to it.
    """

    config: ModelConfig

    def stack(self, name: str) -> LayerStack:
        return self.get_variable("params", name)

    def project(
        self, x: jax.Array, layer: Layer, *names: str, adapter_mask: jax.Array | None = None, arithmetic: str = ""
    ) -> list[jax.Array]:
        """x [tokens, in] through each named matrix, its bias, if the file has one, and its adapters: float32 [tokens, out].
        arithmetic: of the products, if it is not `config.dtype`."""
        stacks = [self.stack(name) for name in names]
        dtype, implementation = arithmetic or self.config.dtype, self.config.implementation
        ys = linears(x.astype(self.config.activations), stacks, layer, dtype, implementation)
        biases = [self.stack(name + "_bias") for name in names]
        ys = [y if bias is None else y + bias.vector(layer) for y, bias in zip(ys, biases, strict=True)]
        return [
            y + self.adapted(x, layer, name, adapter_mask) if self.adapts(layer, name, adapter_mask) else y
            for y, name in zip(ys, names, strict=True)
        ]

    def trained(self, name: str) -> Pair | None:
        """The pair of a matrix that is being trained, in float32."""
        pair: Pair | None = self.get_variable(TRAINED, name)
        return pair and Pair(pair.a.astype(jnp.float32), pair.b.astype(jnp.float32), pair.scale)

    def norm(self, x: jax.Array, name: str, layer: Layer) -> jax.Array:
        """x, normalized if there is such a norm."""
        stack = self.stack(name)
        return x if stack is None else rms_norm(x, stack.vector(layer), self.config.rms_norm_eps)

    def adapts(self, layer: Layer, name: str, adapter_mask: jax.Array | None) -> bool:
        stack = self.stack(name + adapters.A)
        return self.trained(name) is not None or (adapter_mask is not None and stack is not None and stack.has(layer))

    def adapted(self, x: jax.Array, layer: Layer, name: str, adapter_mask: jax.Array | None) -> jax.Array:
        """The term that the adapters add to a projection of x: float32 [tokens, out]."""
        with jax.named_scope("adapters"):
            if (pair := self.trained(name)) is not None:
                inner = jnp.dot(x.astype(jnp.float32), pair.a.T, precision=lax.Precision.HIGHEST)
                return jnp.dot(pair.scale * inner, pair.b.T, precision=lax.Precision.HIGHEST)
            assert adapter_mask is not None
            inner = linear(x.astype(jnp.float32), self.stack(name + adapters.A), layer)
            return linear(jnp.where(adapter_mask, inner, 0.0), self.stack(name + adapters.B), layer)


class Paged(NamedTuple):
    """The inputs of attention that belong to a step. kv_slots int32 [tokens]: where keys and values go; rope: cos and sin."""

    kv_slots: jax.Array
    metadata: Any
    rope: tuple[jax.Array, jax.Array]


class Packed(NamedTuple):
    """What any mixer gets of a batch of whole sequences, without a cache or state. first int32 [tokens]: the first token of
    each one's sequence; rope: as of `Paged`, for attention."""

    first: jax.Array
    rope: tuple[jax.Array, jax.Array] | None


class Attention(LayerModule):
    """Grouped-query attention over the paged cache, or inside packed sequences; with RMSNorm of queries and keys per head, if
    the file has it."""

    spec: AttentionSpec

    def __call__(
        self, x: jax.Array, cache: Any, layer: Layer, index: Index, told: Paged | Packed, adapter_mask: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """As in `MIXERS`."""
        config, spec, tokens, eps = self.config, self.spec, x.shape[0], self.config.rms_norm_eps
        assert told.rope is not None

        def norm(name: str) -> Norm:
            stack = self.stack(name)
            return None if stack is None else stack.located(layer)

        names = ["query"] if spec.shared_kv else ["query", "key"] if spec.key_is_value else ["query", "key", "value"]
        with jax.named_scope("qkv"):
            # int8 would lose most here, because the scores are exponents; and these matrices are small.
            arithmetic = "int8x2" if config.dtype == "int8" else config.dtype
            ys = self.project(x, layer, *names, adapter_mask=adapter_mask, arithmetic=arithmetic)
            q, *kv = (y.reshape(tokens, -1, spec.head_dim) for y in ys)
            if spec.gated:  # head by head the query, then its gate
                q, gate = q[:, 0::2], q[:, 1::2]
        with jax.named_scope("append"):
            if spec.shared_kv:
                q = turned(q, norm("query_norm"), told.rope, eps)
            else:
                k, v = (self.own_heads(heads, layer) for heads in (kv[0], kv[-1]))
                if spec.value_norm:
                    v = rms_norm(v, jnp.ones(spec.head_dim), eps)
                norms = norm("query_norm"), norm("key_norm")
                if isinstance(told, Packed):
                    q, k = (turned(heads, own, told.rope, eps) for heads, own in zip((q, k), norms, strict=True))
                else:
                    q, cache = append(q, k, v, cache, index, told.kv_slots, told.rope, *norms, eps, config.implementation)
        sinks = self.stack("sinks").vector(layer) if spec.sinks else None
        with jax.named_scope("segment_attention" if isinstance(told, Packed) else "paged_attention"):
            if isinstance(told, Packed):
                y = segment_attention(q, k, v, told.first, spec.score_scale, spec.window, sinks, config.activations)
            else:
                y = paged_attention(q, cache, index, told.metadata, spec.score_scale, sinks)
            if spec.gated:
                y = y * sigmoid(gate)
        with jax.named_scope("attention_output"):
            return self.project(y.reshape(tokens, -1), layer, "output", adapter_mask=adapter_mask)[0], cache

    def own_heads(self, heads: jax.Array, layer: Layer) -> jax.Array:
        """Of keys or values [tokens, heads, head_dim]: the one head that this device's queries have, if there are fewer heads
        than devices on a mesh; else all."""
        own = self.spec.num_kv_heads
        if heads.shape[1] == own:
            return heads
        over = tensor_of(self.stack("query"), layer).over(-2)
        first = lax.axis_index(over) * heads.shape[1] // lax.axis_size(over)
        return lax.dynamic_slice_in_dim(heads, first, own, axis=1)


class FeedForward(LayerModule):
    """SwiGLU, down(silu(gate x) * up x) (arXiv 2002.05202), the same with GELU, or a mixture of SwiGLUs."""

    spec: Dense | Mixture

    def __call__(
        self, x: jax.Array, stream: jax.Array, layer: Layer, live: jax.Array, adapter_mask: jax.Array | None = None
    ) -> jax.Array:
        """x, stream float32, live bool [tokens] -> float32, all [tokens, hidden_size]. stream: the residual stream, of which x
        is the normalized form; experts with a norm of their own normalize the stream by that instead."""
        if isinstance(self.spec, Mixture):
            y = self.mixture(x, stream, layer, live, self.spec, adapter_mask)
            return y + self.shared(x, layer, adapter_mask, self.spec.activation) if self.spec.shared_width else y
        return self.dense(x, layer, adapter_mask, activation=self.spec.activation)

    def dense(
        self, x: jax.Array, layer: Layer, adapter_mask: jax.Array | None, prefix: str = "", activation: str = "silu"
    ) -> jax.Array:
        """The SwiGLU whose matrices are called `prefix` and gate, up and down; activation: as of `Dense`."""
        names = prefix + "gate", prefix + "up"
        if activation == "silu" and not any(
            self.stack(f"{name}_bias") is not None or self.adapts(layer, name, adapter_mask) for name in names
        ):
            x, (first, second) = x.astype(self.config.activations), (self.stack(name) for name in names)
            hidden = gated_linear(x, first, second, layer, self.config.dtype, self.config.implementation)
        else:
            gate, up = self.project(x, layer, *names, adapter_mask=adapter_mask)
            hidden = (gelu(gate) if activation == "gelu_tanh" else silu(gate)) * up
        return self.project(hidden, layer, prefix + "down", adapter_mask=adapter_mask)[0]

    def shared(self, x: jax.Array, layer: Layer, adapter_mask: jax.Array | None, activation: str) -> jax.Array:
        """What every token gets in addition to its experts: a SwiGLU, normalized or times the sigmoid of x's product with a
        vector if there is one."""
        with jax.named_scope("shared_expert"):
            prefix = "shared_" if self.stack("shared_gate") is not None else ""  # where all layers have it
            y = self.norm(self.dense(x, layer, adapter_mask, prefix, activation), "shared_output_norm", layer)
            vector = self.stack("shared_router")
            return y if vector is None else sigmoid(row_sum(x * vector.vector(layer))) * y

    def mixture(
        self,
        x: jax.Array,
        stream: jax.Array,
        layer: Layer,
        live: jax.Array,
        spec: Mixture,
        adapter_mask: jax.Array | None,
    ) -> jax.Array:
        """The experts that the router chooses for each token, each a SwiGLU, summed with their weights in the order chosen."""
        config, routed = self.config, x
        if self.stack("expert_norm") is not None:
            x, scale = self.norm(stream, "expert_norm", layer), self.stack("router_scale").vector(layer)
            routed = rms_norm(stream, scale * config.hidden_size**-0.5, config.rms_norm_eps)
        with jax.named_scope("router"):
            logits = linear(routed, self.stack("router"), layer, implementation=config.implementation)
            if (bias := self.stack("router_bias")) is not None:
                logits = logits + bias.vector(layer)
            bias = self.stack("selection_bias")
            vector, implementation = None if bias is None else bias.vector(layer), config.implementation
            expert_ids, expert_weights = route(logits, live, router_of(spec), vector, implementation=implementation)
            if (scales := self.stack("expert_scale")) is not None:
                expert_weights = expert_weights * scales.vector(layer).at[expert_ids].get(mode="clip")
            self.sow(ROUTING, "experts", (expert_ids, expert_weights))
        with jax.named_scope("experts"):
            gate, up, down = (self.stack(f"expert_{name}") for name in _PROJECTIONS)
            biases = [self.stack(f"expert_{name}_bias") for name in _PROJECTIONS]
            added = self.expert_adapters(layer, adapter_mask)
            x, dtype = x.astype(config.activations), config.dtype
            y = mixture(
                x,
                expert_ids,
                expert_weights,
                gate,
                up,
                down,
                layer,
                dtype,
                config.implementation,
                biases=[bias for bias in biases if bias is not None],
                clamp=clamp_of(spec),
                adapters=added,
                activation=spec.activation,
            )
            return self.norm(y, "expert_output_norm", layer)

    def expert_adapters(self, layer: Layer, adapter_mask: jax.Array | None) -> ExpertAdapters | None:
        """The pairs of the experts. Of those that are being trained gate and up share an A, and the rows of B are gate's, then
        up's."""

        def stacked(name: str) -> Pair | None:
            if not self.adapts(layer, name, adapter_mask):
                return None
            a, b = (operand(self.stack(name + factor), layer) for factor in (adapters.A, adapters.B))
            return Pair(a, b, 1.0, adapter_mask)

        if adapter_mask is not None:
            pairs = ExpertAdapters(*(stacked(f"expert_{name}") for name in _PROJECTIONS))
            return pairs if any(pairs) else None
        both, down = self.trained("expert_gate_up"), self.trained("expert_down")
        gate, up = (both._replace(b=b) for b in jnp.split(both.b, 2, axis=1)) if both else (None, None)
        return ExpertAdapters(gate, up, down) if both or down else None


def router_of(spec: Mixture) -> Router:
    """How a mixture chooses its experts."""
    return Router(
        spec.experts_per_token,
        spec.normalize,
        spec.scale,
        spec.scoring,
        spec.eps,
        spec.groups,
        spec.groups_used,
        spec.group_best,
    )


def clamp_of(spec: Mixture) -> Clamp | None:
    """The clamp of a mixture's SwiGLUs, if there is one."""
    return Clamp(spec.limit, spec.alpha) if spec.limit else None


# The module of each kind of mixer (`kind_of`), and the name of its parameters. A module is called with x float32 [tokens,
# hidden_size], its part of the state, the layer, the layer's index in that part, its inputs of the step (`Paged`, `Recurrence`
# for a mixer that recurs, or `Packed` without a state) and the adapter_mask; it returns the term to add to x, and its part of
# the state.
MIXERS: dict[type, tuple[str, Any]] = {AttentionSpec: ("attention", Attention)}


def kind_of(mixer: Any) -> type:
    """The key of a mixer in `MIXERS`."""
    return Latent if isinstance(mixer, AttentionSpec) and mixer.latent else type(mixer)


class Block(LayerModule):
    """One pre-norm transformer layer; what its two parts add may be normalized, too, if the file has such norms."""

    spec: LayerSpec

    def setup(self) -> None:
        name, module = MIXERS[kind_of(self.spec.mixer)]
        setattr(self, name, module(self.config, self.spec.mixer))
        self.feed_forward = FeedForward(self.config, self.spec.feed_forward)

    def __call__(
        self,
        x: jax.Array,
        part: Any,
        layer: Layer,
        index: Index,
        told: Any,
        live: jax.Array,
        adapter_mask: jax.Array | None = None,
        inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """x float32 [tokens, hidden_size] after the layer, and its part of the state. live bool [tokens]: no padding; inputs
        float32 [tokens, layers, input_width]: what each layer alone gets; the rest as in `MIXERS`."""
        name, _ = MIXERS[kind_of(self.spec.mixer)]
        with jax.named_scope(name):
            y, part = getattr(self, name)(self.norm(x, "attention_norm", layer), part, layer, index, told, adapter_mask)
            x = x + self.norm(y, "attention_output_norm", layer)
        with jax.named_scope("feed_forward"):
            y = self.feed_forward(self.norm(x, "feed_forward_norm", layer), x, layer, live, adapter_mask)
            x = x + self.norm(y, "feed_forward_output_norm", layer)
        if inputs is not None and self.spec.input_width:
            with jax.named_scope("layer_input"):
                (y,) = self.project(x, layer, "input_gate", adapter_mask=adapter_mask)
                y = gelu(y) * lax.dynamic_index_in_dim(inputs, layer.number, 1, keepdims=False)
                (y,) = self.project(y, layer, "input_projection", adapter_mask=adapter_mask)
                x = x + self.norm(y, "input_norm", layer)
        if (scale := self.stack("output_scale")) is not None:
            x = product(x, scale.vector(layer))
        return x, part
