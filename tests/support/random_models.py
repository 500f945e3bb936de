"""Small random models made in memory: a configuration, and parameters in any mix of block formats."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_jax import families
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


def tiny_params(
    config: ModelConfig, format_of: Callable[[str, int], str] = lambda name, layer: "Q8_0", seed: int = 0
) -> dict[str, Any]:
    """Parameters for `config`, all that its family does not call optional; `format_of(name, layer)` gives the format of each
    matrix of a layer, everything else is F32."""
    rng = np.random.default_rng(seed)
    family = families.of_architecture(config.architecture, "a random model")

    def tensor(shape: tuple[int, ...], format: str, std: float, *, vectors: bool = False) -> QuantizedTensor:
        values = rng.uniform(0.5, 1.5, shape).astype(np.float32) if vectors else stored(format, shape, rng, std)
        return QuantizedTensor.of(jnp.asarray(values), format, vectors=vectors)

    params: dict[str, Any] = {"layers": {}}
    for row in family.tensors.whole:
        if not row.optional:
            whole = tensor(family.shape(row, config, None), "F32", 0.3, vectors=len(row.axes) == 1)
            params[row.path[0]] = whole.planes[0] if len(row.axes) == 1 else whole
    for row in family.tensors.layer:
        shapes = {n: family.shape(row, config, n) for n, spec in enumerate(config.layers) if row.layers(spec)}
        if row.optional or not shapes:
            continue
        vectors = len(row.axes) == 1
        formats = ["F32" if vectors else format_of(row.path[-1], n) for n in shapes]
        (shape,) = set(shapes.values())
        stacks = {
            format: tensor((formats.count(format), *shape), format, shape[-1] ** -0.5, vectors=vectors)
            for format in sorted(set(formats))
        }
        by_layer = dict(zip(shapes, formats, strict=True))
        node = params["layers"] if len(row.path) == 1 else params["layers"].setdefault(row.path[0], {})
        node[row.path[-1]] = LayerStack(stacks, tuple(by_layer.get(n, "") for n in range(config.num_layers)))
    return params
