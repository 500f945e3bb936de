"""BERT (arXiv 1810.04805) as an encoder of sentences: every token attends to every other, and a text becomes one vector.

Rows are padded to one length and flattened for the products with weights, so these are the same compressed `linear` as the
decoder's; layers are scanned by index. The residual stream, norms, softmax, scores and pooling are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import EncoderConfig
from ferrum_jax.models.scan import scan_layers
from ferrum_jax.quantized import Layer, linears
from pallas_kernels.reductions import exp

Params = Mapping[str, Any]


def embed(params: Params, tokens: jax.Array, lengths: jax.Array, *, config: EncoderConfig, normalize: bool) -> jax.Array:
    """tokens int32 [rows, length], with lengths int32 [rows] (at least 1) -> float32 [rows, hidden_size], each of Euclidean
    length 1 if `normalize`."""
    hidden = encode(params, tokens, lengths, config=config)
    with jax.named_scope("pooling"):
        if config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            counted = jnp.arange(tokens.shape[1]) < lengths[:, None]
            pooled = jnp.where(counted[..., None], hidden, 0.0).sum(axis=1) / lengths[:, None]
        if normalize:
            pooled = pooled / jnp.maximum(jnp.sqrt(jnp.sum(pooled * pooled, axis=-1, keepdims=True)), 1e-12)
    return pooled


def encode(params: Params, tokens: jax.Array, lengths: jax.Array, *, config: EncoderConfig) -> jax.Array:
    """The last layer's output: float32 [rows, length, hidden_size]; values after a row's length have no meaning."""
    rows, length = tokens.shape
    with jax.named_scope("embedding"):
        x = params["embedding"].gather(tokens.reshape(-1))  # [rows * length, hidden]
        positions = params["positions"].gather(jnp.arange(length)) + params["types"].gather(jnp.zeros(1, jnp.int32))
        x = (x.reshape(rows, length, -1) + positions).reshape(rows * length, -1)
        x = _layer_norm(x, params["embedding_norm"], params["embedding_norm_bias"], config.layer_norm_eps)
    hidden_keys = jnp.where(jnp.arange(length) < lengths[:, None], 0.0, -jnp.inf)[:, None, None]  # [rows, 1, 1, length]
    layers = params["layers"]
    x = scan_layers(layers, lambda x, layer: _layer(layers, x, hidden_keys, layer, config), x)
    return x.reshape(rows, length, -1)


def _layer(layers: Params, x: jax.Array, hidden_keys: jax.Array, layer: Layer, config: EncoderConfig) -> jax.Array:
    """One post-norm layer: x float32 [rows * length, hidden]."""

    def project(x: jax.Array, node: Params, *names: str) -> list[jax.Array]:
        stacks = [node[name] for name in names]
        ys = linears(x.astype(config.activations), stacks, layer, config.dtype, config.implementation)
        return [y + node[name + "_bias"].vector(layer) for y, name in zip(ys, names, strict=True)]

    def norm(x: jax.Array, name: str) -> jax.Array:
        return _layer_norm(x, layers[name].vector(layer), layers[name + "_bias"].vector(layer), config.layer_norm_eps)

    attention, feed_forward = layers["attention"], layers["feed_forward"]
    with jax.named_scope("attention"):
        rows, length = hidden_keys.shape[0], hidden_keys.shape[-1]
        q, k, v = (  # [rows, heads, length, head_dim]: with heads after lengths, XLA's products on a CPU take ten times as long
            y.reshape(rows, length, config.num_heads, -1).swapaxes(1, 2) for y in project(x, attention, "query", "key", "value")
        )
        scores = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k, precision=lax.Precision.HIGHEST) + hidden_keys
        weights = exp(scores - scores.max(axis=-1, keepdims=True))
        y = jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision=lax.Precision.HIGHEST)
        y = (y / weights.sum(axis=-1, keepdims=True)).swapaxes(1, 2)
        x = norm(x + project(y.reshape(x.shape), attention, "output")[0], "attention_norm")
    with jax.named_scope("feed_forward"):
        (up,) = project(x, feed_forward, "up")
        gelu = 0.5 * up * (1.0 + lax.erf(up * 0.5**0.5))  # arXiv 1606.08415, exactly
        return norm(x + project(gelu, feed_forward, "down")[0], "feed_forward_norm")


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Over the last axis (arXiv 1607.06450)."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias
