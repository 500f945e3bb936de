"""Attention over latent vectors (arXiv 2405.04434): the cache holds one vector and one rotated key of a token, not its heads'.

The idea is to absorb the matrices of keys and values, which are linear: a head's score q . (K c) is (K' q) . c, and the sum of
values V c_i is V times the sum of c_i. So queries are taken to the space of latent vectors, all heads attend to the same
cached rows, and the result is taken out again. Every token does so, however many there are in a step, so the bits of a request
depend neither on the batch nor on how it is cut.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax import adapters
from ferrum_jax.config import Attention as AttentionSpec
from ferrum_jax.config import Latent
from ferrum_jax.models.layers import MIXERS, Index, LayerModule, Packed, Paged
from ferrum_jax.quantized import Layer, linear_by_head
from pallas_kernels.append import rotate
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.reductions import rms_norm
from pallas_kernels.segment_attention import segment_attention

_EPS = 1e-6  # of the norms of both vectors, whatever the configuration says about the others


class LatentAttention(LayerModule):
    """Parameters: matrices `query`, or `query_a` and `query_b` with the vector `query_norm`; `key_value_a` (the latent vector,
    then the key to rotate) with the vector `latent_norm`; `key_b` [heads, latent, nope] and `value_b` [heads, values, latent];
    `output`."""

    spec: AttentionSpec

    def __call__(
        self, x: jax.Array, cache: Any, layer: Layer, index: Index, told: Paged | Packed, adapter_mask: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """As in `MIXERS`."""
        config, latent, tokens = self.config, self.spec.latent, x.shape[0]
        assert latent is not None and told.rope is not None
        # int8 would lose most here, because the scores are exponents; and these matrices are small.
        arithmetic = "int8x2" if config.dtype == "int8" else config.dtype

        def project(x: jax.Array, *names: str) -> list[jax.Array]:
            return self.project(x, layer, *names, adapter_mask=adapter_mask, arithmetic=arithmetic)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return rms_norm(x, self.stack(name).vector(layer), _EPS)

        def by_head(x: jax.Array, name: str) -> jax.Array:
            y = linear_by_head(x.astype(config.activations), self.stack(name), layer, arithmetic, config.implementation)
            if adapter_mask is None or not self.adapts(layer, name, adapter_mask):
                return y
            inner = linear_by_head(x.astype(jnp.float32), self.stack(name + adapters.A), layer)
            return y + linear_by_head(jnp.where(adapter_mask[:, None], inner, 0.0), self.stack(name + adapters.B), layer)

        with jax.named_scope("qkv"):
            q, kv = project(x, "query_a" if latent.query_width else "query", "key_value_a")
            if latent.query_width:
                (q,) = project(norm(q, "query_norm"), "query_b")
            q = q.reshape(tokens, self.spec.num_heads, -1)
        with jax.named_scope("append"):
            key = _turned(kv[:, None, latent.width :], told.rope)
            key = jnp.concatenate([norm(kv[:, : latent.width], "latent_norm")[:, None], key], axis=-1)
            if isinstance(told, Paged):
                cache = cache.write(index, told.kv_slots, key, None)
        with jax.named_scope("paged_attention" if isinstance(told, Paged) else "segment_attention"):
            q = jnp.concatenate([by_head(q[..., : latent.nope], "key_b"), _turned(q[..., latent.nope :], told.rope)], axis=-1)
            if isinstance(told, Paged):
                y = paged_attention(q, cache, index, told.metadata, self.spec.score_scale)
            else:
                values, scale = key[..., : latent.width], self.spec.score_scale
                y = segment_attention(q, key, values, told.first, scale, arithmetic=config.activations)
            y = by_head(y, "value_b")
        with jax.named_scope("attention_output"):
            return self.project(y.reshape(tokens, -1), layer, "output", adapter_mask=adapter_mask)[0], cache


def _turned(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [tokens, heads, dim] rotated in pairs of neighbors; first the first ones of all pairs, then the second ones, which is
    the same permutation for queries and keys."""
    return rotate(jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), *rope)


MIXERS[Latent] = "attention", LatentAttention
