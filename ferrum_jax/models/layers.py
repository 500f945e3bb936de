"""The parts of a decoder layer: norm, attention, dense feed-forward, mixture of experts.

Flax modules used purely. Each reads its own parameters, stacked over layers, and is told which `Layer` it is; the
residual stream is float32, matrix products run in `config.dtype`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import ModelConfig
from ferrum_jax.kv_cache import KVCache
from ferrum_jax.models.rope import rotate
from ferrum_jax.quantized import Layer, LayerStack, grouped_linear, linear
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.reductions import row_sum


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467)."""
    return x * lax.rsqrt(row_sum(x * x) / x.shape[-1] + eps) * weight


class LayerModule(nn.Module):
    """A module whose parameters are `LayerStack`s."""

    config: ModelConfig

    def stack(self, name: str) -> LayerStack:
        return self.get_variable("params", name)

    def project(self, x: jax.Array, name: str, layer: Layer) -> jax.Array:
        """x [tokens, in] through the matrix `name` and its bias, if the file has one: float32 [tokens, out]."""
        y = linear(x.astype(self.config.dtype), self.stack(name), layer)
        bias = self.stack(name + "_bias")
        return y if bias is None else y + bias.vector(layer)


class Attention(LayerModule):
    """Grouped-query attention over the paged cache; per-head RMSNorm of queries and keys where the file has it."""

    def __call__(self, x, cache: KVCache, layer: Layer, slots, plan, rope) -> tuple[jax.Array, KVCache]:
        config, tokens = self.config, x.shape[0]

        def heads(name: str, count: int) -> jax.Array:
            return self.project(x, name, layer).reshape(tokens, count, config.head_dim)

        def normed(x: jax.Array, name: str) -> jax.Array:
            norm = self.stack(name)
            return x if norm is None else rms_norm(x, norm.vector(layer), config.rms_norm_eps)

        with jax.named_scope("qkv"):
            q = rotate(normed(heads("query", config.num_heads), "query_norm"), *rope)
            k = rotate(normed(heads("key", config.num_kv_heads), "key_norm"), *rope)
            v = heads("value", config.num_kv_heads)
        with jax.named_scope("cache_write"):
            cache = cache.write(layer.number, slots, k, v)
        with jax.named_scope("paged_attention"):
            y = paged_attention(q, cache.k, cache.v, layer.number, plan, config.head_dim**-0.5)
        with jax.named_scope("attention_output"):
            return self.project(y.reshape(tokens, -1), "output", layer), cache


class FeedForward(LayerModule):
    """SwiGLU: down(silu(gate x) * up x) (arXiv 2002.05202)."""

    def __call__(self, x, layer: Layer, slots) -> jax.Array:
        hidden = jax.nn.silu(self.project(x, "gate", layer)) * self.project(x, "up", layer)
        return self.project(hidden, "down", layer)


class MixtureOfExperts(LayerModule):
    """The top_k experts of each token by router probability, each a SwiGLU, summed with their weights in slot order."""

    def __call__(self, x, layer: Layer, slots) -> jax.Array:
        config, tokens, top_k = self.config, x.shape[0], self.config.experts_per_token
        with jax.named_scope("router"):
            logits = linear(x, self.stack("router"), layer)
            odds = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            weights, experts = lax.top_k(odds / row_sum(odds), top_k)  # [tokens, top_k]; ties: the smaller index
            if config.norm_topk_prob:
                total = row_sum(weights)
                weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / top_k)
            weights = weights * config.expert_weights_scale
        with jax.named_scope("group_by_expert"):
            # Rows sorted by expert, stably; padding goes behind the last expert, where nothing is computed.
            experts = jnp.where(slots[:, None] < 0, config.num_experts, experts).reshape(-1)
            order = jnp.argsort(experts, stable=True)
            starts = jnp.searchsorted(experts[order], jnp.arange(config.num_experts + 1))
            group_sizes = jnp.diff(starts).astype(jnp.int32)
            rows = x.astype(config.dtype)[order // top_k]
        with jax.named_scope("experts"):
            gate = grouped_linear(rows, group_sizes, self.stack("expert_gate"), layer)
            up = grouped_linear(rows, group_sizes, self.stack("expert_up"), layer)
            hidden = (jax.nn.silu(gate) * up).astype(config.dtype)
            y = grouped_linear(hidden, group_sizes, self.stack("expert_down"), layer)
        with jax.named_scope("combine"):
            y = y[jnp.argsort(order)].reshape(tokens, top_k, -1)
            return sum((y[:, slot] * weights[:, slot, None] for slot in range(1, top_k)), y[:, 0] * weights[:, :1])


class Block(LayerModule):
    """One pre-norm transformer layer."""

    def setup(self) -> None:
        self.attention = Attention(self.config)
        self.feed_forward = (MixtureOfExperts if self.config.num_experts else FeedForward)(self.config)

    def __call__(self, x, cache: KVCache, layer: Layer, slots, plan, rope) -> tuple[jax.Array, KVCache]:
        def norm(name: str) -> jax.Array:
            return rms_norm(x, self.stack(name).vector(layer), self.config.rms_norm_eps)

        with jax.named_scope("attention"):
            y, cache = self.attention(norm("attention_norm"), cache, layer, slots, plan, rope)
        x = x + y
        with jax.named_scope("feed_forward"):
            return x + self.feed_forward(norm("feed_forward_norm"), layer, slots), cache
