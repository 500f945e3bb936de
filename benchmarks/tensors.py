"""The tensors and the parameters of a model that exists only as a configuration, from its family's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from ferrum_jax import families
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights import names
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels.dispatch import Target

WHERE = Path("synthetic")  # in place of a file
FormatOf = Callable[[str, int | None, ModelConfig], str]


def q4_k_m(name: str, layer: int | None, config: ModelConfig) -> str:
    """llama.cpp's Q4_K_M: the format of a matrix by the name of its parameter."""
    large = name in ("value", "expert_down") and more_bits(layer or 0, config.num_layers)
    return "Q6_K" if large or name == "unembedding" else "Q4_K"


def more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M gives this layer's attn_v and ffn_down 6 bits: the first and last eighth, and every third
    between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(config: ModelConfig, format_of: FormatOf = q4_k_m) -> list[TensorInfo]:
    """The tensors that its GGUF file would have, with an output matrix. Vectors and routers are float32."""
    family, found = families.of_architecture(config.architecture, str(WHERE)), []
    for name, row, layer in family.tensors_of(config):
        if not row.optional or row.path == ("unembedding",):
            is_plain = len(row.axes) == 1 or not row.quantize
            format = "F32" if is_plain else format_of(row.path[-1], layer, config)
            found.append(TensorInfo(name, format, family.shape(row, config, layer), WHERE, 0, 0))
    return found


def shapes(config: ModelConfig, target: Target, format_of: FormatOf = q4_k_m) -> dict[str, Any]:
    """The parameters that loading such a file makes for a device, as `jax.ShapeDtypeStruct`s without places."""
    file: Any = SimpleNamespace(path=WHERE, tensors={tensor.name: tensor for tensor in tensors(config, format_of)})
    params = abstract_parameters(names.parameters(file, config), Placement.abstract(target))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
