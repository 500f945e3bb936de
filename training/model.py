"""The Qwen3-MoE of ferrum_jax as a function of plain arrays, differentiable with respect to every weight.

The package's own forward pass reads compressed weights and has derivatives with respect to activations alone, so training needs
this one. It has no cache and no ragged axis: [batch, length] windows hold stories laid end to end, and each token attends to
its own story only. `training.train` checks that both give the same logits.

Parameters are float32, named and shaped ([out, in]) like the tensors of a GGUF file: {"token_embd", "output_norm", "layers":
[{"attn_q", ...}, ...]}; the output matrix is tied to the embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.models.rope import rope_angles

END = 0  # the id of <|endoftext|>, which begins every story and ends it
BALANCE, ROUTER_Z = 0.01, 0.001  # weights of the two losses of the router

Params = dict[str, Any]


class Routing(NamedTuple):
    """What the routers of a batch did. expert_ids int32 [layers, rows, top_k]; balance, z: the losses of Switch Transformer
    (arXiv 2101.03961; 1 if all experts get the same share) and ST-MoE (2202.08906), means over layers."""

    expert_ids: jax.Array
    balance: jax.Array
    z: jax.Array


def init(config: ModelConfig, seed: int) -> Params:
    """Normal weights of variance 1 / columns; matrices that write to the residual stream are smaller by sqrt(2 layers)."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(0, scale * shape[-1] ** -0.5, shape), jnp.float32)

    hidden, width, experts = config.hidden_size, config.expert_intermediate_size, config.num_experts
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    small = (2 * config.num_layers) ** -0.5

    def layer() -> Params:
        return {
            "attn_norm": jnp.ones(hidden),
            "attn_q": matrix(queries, hidden),
            "attn_k": matrix(keys, hidden),
            "attn_v": matrix(keys, hidden),
            "attn_q_norm": jnp.ones(config.head_dim),
            "attn_k_norm": jnp.ones(config.head_dim),
            "attn_output": matrix(hidden, queries, scale=small),
            "ffn_norm": jnp.ones(hidden),
            "ffn_gate_inp": matrix(experts, hidden),
            "ffn_gate_exps": matrix(experts, width, hidden),
            "ffn_up_exps": matrix(experts, width, hidden),
            "ffn_down_exps": matrix(experts, hidden, width, scale=small),
        }

    layers = [layer() for _ in range(config.num_layers)]
    return {"token_embd": matrix(config.vocab_size, hidden), "output_norm": jnp.ones(hidden), "layers": layers}


def forward(
    params: Params, tokens: jax.Array, config: ModelConfig, dtype: str = "float32", room: float = 0.0
) -> tuple[jax.Array, Routing]:
    """tokens int32 [batch, length] -> float32 logits [batch, length, vocab] and what the routers did. dtype: of the operands of
    matrix products, which accumulate in float32; everything else is float32. room: as in `mixture`."""
    batch, length = tokens.shape
    story = jnp.cumsum(tokens == END, axis=1)
    visible = (story[:, :, None] == story[:, None, :]) & jnp.tri(length, dtype=bool)  # [batch, query, key]
    cos, sin = rope_angles(config.layers[0].mixer.rope, jnp.arange(length), None)
    x = params["token_embd"][tokens].reshape(batch * length, -1)
    routings = []
    for layer in params["layers"]:
        y = rms_norm(x, layer["attn_norm"], config)
        x = x + attention(layer, y, visible, cos, sin, config, dtype)
        y, routing = mixture(layer, rms_norm(x, layer["ffn_norm"], config), config, dtype, room)
        x = x + y
        routings.append(routing)
    logits = dot(rms_norm(x, params["output_norm"], config), params["token_embd"], dtype)
    expert_ids, balance, z = (jnp.stack(each) for each in zip(*routings, strict=True))
    return logits.reshape(batch, length, -1), Routing(expert_ids, balance.mean(), z.mean())


def loss(params: Params, tokens: jax.Array, config: ModelConfig, dtype: str = "float32", room: float = 0.0):
    """tokens int32 [batch, length + 1]: the loss, and (mean nats per token, what the routers did)."""
    logits, routing = forward(params, tokens[:, :-1], config, dtype, room)
    nats = -token_logprobs(logits, tokens[:, 1:]).mean()
    return nats + BALANCE * routing.balance + ROUTER_Z * routing.z, (nats, routing)


def token_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities of targets [batch, length] under logits [batch, length, vocab]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def dot(x: jax.Array, matrix: jax.Array, dtype: str) -> jax.Array:
    """x [rows, in] times the transposed matrix [out, in]: float32 [rows, out]."""
    return jnp.einsum("ri,oi->ro", x.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [batch, length, heads, head_dim] by the angles [length, 1, head_dim / 2], half-split layout."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(layer: Params, x: jax.Array, visible, cos, sin, config: ModelConfig, dtype: str) -> jax.Array:
    """x [batch * length, hidden] -> the same shape; `visible` [batch, query, key] says which keys a query attends to."""
    batch, length, _ = visible.shape
    heads = (batch, length, -1, config.head_dim)
    q, k, v = (dot(x, layer[f"attn_{name}"], dtype).reshape(heads) for name in "qkv")
    q = rotate(rms_norm(q, layer["attn_q_norm"], config), cos, sin) * config.head_dim**-0.5
    k = rotate(rms_norm(k, layer["attn_k_norm"], config), cos, sin)
    q = q.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
    q, k, v = (each.astype(dtype) for each in (q, k, v))
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1).astype(dtype)
    y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, preferred_element_type=jnp.float32)
    return dot(y.reshape(batch * length, -1), layer["attn_output"], dtype)


def route(logits: jax.Array, config: ModelConfig) -> tuple[jax.Array, Routing]:
    """logits [rows, experts] -> the weights of the chosen experts, float32 [rows, top_k], and what the router did."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, expert_ids = jax.lax.top_k(probabilities, config.experts_per_token)
    load = jax.nn.one_hot(expert_ids, config.num_experts).mean((0, 1))
    balance = config.num_experts * jnp.sum(load * probabilities.mean(0))
    routing = Routing(expert_ids, balance, jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean())
    return weights / weights.sum(-1, keepdims=True), routing


def mixture(layer: Params, x: jax.Array, config: ModelConfig, dtype: str, room: float) -> tuple[jax.Array, Routing]:
    """x [rows, hidden] through the experts of each row: [rows, hidden].

    Rows are copied to their experts, each of which takes `room` times an even share of them; rows beyond that are dropped. room
    0: it takes all.
    """
    rows, experts, top_k = x.shape[0], config.num_experts, config.experts_per_token
    weights, routing = route(dot(x, layer["ffn_gate_inp"], "float32"), config)
    capacity = min(rows, round(room * rows * top_k / experts)) or rows
    expert = routing.expert_ids.reshape(-1)  # [rows * top_k]
    mine = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    rank = (jnp.cumsum(mine, axis=0) * mine).sum(1) - 1
    target = jnp.where(rank < capacity, expert * capacity + rank, experts * capacity)  # the last place stands for "dropped"
    source = jnp.zeros(experts * capacity, jnp.int32).at[target].set(jnp.arange(rows * top_k) // top_k, mode="drop")
    inputs = x[source].reshape(experts, capacity, -1).astype(dtype)

    def each(x: jax.Array, name: str) -> jax.Array:
        matrices = layer[f"ffn_{name}_exps"].astype(dtype)
        return jnp.einsum("epi,eoi->epo", x.astype(dtype), matrices, preferred_element_type=jnp.float32)

    outputs = each(jax.nn.silu(each(inputs, "gate")) * each(inputs, "up"), "down").reshape(experts * capacity, -1)
    found = outputs.at[target].get(mode="fill", fill_value=0.0).reshape(rows, top_k, -1)
    return jnp.einsum("rkh,rk->rh", found, weights), routing
