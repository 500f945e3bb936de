"""Small random models made in memory: a configuration, and parameters in any mix of block formats."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_jax import families
from ferrum_jax.config import ModelConfig
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.weights.names import kinds_of, parameters
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


def tiny_params(
    config: ModelConfig, format_of: Callable[[str, int], str] = lambda name, layer: "Q8_0", seed: int = 0
) -> dict[str, Any]:
    """Parameters for `config`, all that its family does not call optional; `format_of(name, layer)` gives the format of each
    matrix of a layer, everything else is F32."""
    rng = np.random.default_rng(seed)
    family = families.of_architecture(config.architecture, "a random model")
    file: Any = SimpleNamespace(path="a random model", tensors={}, is_gguf=False)
    for name, row, layer in family.tensors_of(config):
        if not row.optional:
            format = "F32" if layer is None or len(row.axes) == 1 else format_of(row.path[-1], layer)
            file.tensors[name] = TensorInfo(name, format, family.shape(row, config, layer), Path(), 0, 0)

    def stack(first: TensorInfo, count: int) -> QuantizedTensor:
        shape, vectors = (count, *first.shape), len(first.shape) == 1
        values = rng.uniform(0.5, 1.5, shape) if vectors else stored(first.format, shape, rng, shape[-1] ** -0.5)
        return QuantizedTensor.of(jnp.asarray(values, np.float32 if vectors else None), first.format, vectors=vectors)

    layers: dict[str, Any] = {}
    for path, tensors in parameters(file, config).stacked.items():
        kinds = kinds_of(tensors)
        stacks = {kind: stack(tensors[kinds.index(kind)], kinds.count(kind)) for kind in sorted(set(kinds) - {""})}
        node = layers if len(path) == 1 else layers.setdefault(path[0], {})
        node[path[-1]] = LayerStack(stacks, kinds)
    return {
        "embedding": QuantizedTensor.of(jnp.asarray(stored("F32", (config.vocab_size, config.hidden_size), rng, 0.3)), "F32"),
        "final_norm": jnp.asarray(rng.uniform(0.5, 1.5, config.hidden_size), np.float32),
        "layers": layers,
    }
