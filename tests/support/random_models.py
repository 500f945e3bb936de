"""Small random models made in memory: a configuration, and parameters in any mix of block formats."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from pallas_kernels.blocks import FORMATS
from pallas_kernels.blocks.synthetic import random_blocks

DENSE = ModelConfig(
    architecture="qwen3",
    num_layers=3,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=48,
    vocab_size=320,
    context_length=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_dim=48,
)
MOE = dataclasses.replace(
    DENSE,
    architecture="qwen3moe",
    intermediate_size=0,
    num_experts=16,
    experts_per_token=4,
    expert_intermediate_size=64,
    norm_topk_prob=True,
)


def stored(format: str, shape: tuple[int, ...], rng: np.random.Generator, std: float) -> np.ndarray:
    """Random blocks of a format: [*shape[:-1], stored width]."""
    raw = random_blocks(format, int(np.prod(shape[:-1])), shape[-1], rng, std)
    return raw.view(FORMATS[format].storage).reshape(*shape[:-1], -1)


def tiny_params(config: ModelConfig, format_of: Callable[[str, int], str] = lambda name, layer: "Q8_0", seed: int = 0):
    """Parameters for `config`; `format_of(name, layer)` gives the format of each matrix, norms are F32."""
    rng = np.random.default_rng(seed)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_experts

    def matrix(name: str, *shape: int) -> LayerStack:
        layout = tuple(format_of(name, layer) for layer in range(config.num_layers))
        stacks = {
            format: QuantizedTensor.of(
                jnp.asarray(stored(format, (layout.count(format), *shape), rng, shape[-1] ** -0.5)), format
            )
            for format in sorted(set(layout))
        }
        return LayerStack(stacks, layout)

    def norm(size: int) -> LayerStack:
        values = rng.uniform(0.5, 1.5, (config.num_layers, size)).astype(np.float32)
        return LayerStack({"F32": QuantizedTensor.of(jnp.asarray(values), "F32", vectors=True)}, ("F32",) * config.num_layers)

    if experts:
        inner = config.expert_intermediate_size
        feed_forward = {
            "router": matrix("router", experts, hidden),
            "expert_gate": matrix("expert_gate", experts, inner, hidden),
            "expert_up": matrix("expert_up", experts, inner, hidden),
            "expert_down": matrix("expert_down", experts, hidden, inner),
        }
    else:
        feed_forward = {
            "gate": matrix("gate", width, hidden),
            "up": matrix("up", width, hidden),
            "down": matrix("down", hidden, width),
        }
    attention = {
        "query": matrix("query", queries, hidden),
        "key": matrix("key", keys, hidden),
        "value": matrix("value", keys, hidden),
        "output": matrix("output", hidden, queries),
        "query_norm": norm(config.head_dim),
        "key_norm": norm(config.head_dim),
    }
    embedding = stored("F32", (config.vocab_size, hidden), rng, 0.3)
    return {
        "embedding": QuantizedTensor.of(jnp.asarray(embedding), "F32"),
        "final_norm": jnp.asarray(rng.uniform(0.5, 1.5, hidden).astype(np.float32)),
        "layers": {
            "attention_norm": norm(hidden),
            "feed_forward_norm": norm(hidden),
            "attention": attention,
            "feed_forward": feed_forward,
        },
    }
