"""The tensors and the parameters of a model that exists only as a configuration, from its family's table."""

from __future__ import annotations

import math
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
from pallas_kernels.blocks import FORMATS
from pallas_kernels.dispatch import Target

WHERE = Path("synthetic")  # in place of a file
FormatOf = Callable[[str, int | None, ModelConfig], str]


def q4_k_m(name: str, layer: int | None, config: ModelConfig) -> str:
    """llama.cpp's Q4_K_M: the format of a matrix by the name of its parameter."""
    sensitive = name in ("value", "qkv", "down", "expert_down", "shared_down")
    return "Q6_K" if name == "unembedding" or (sensitive and more_bits(layer or 0, config.num_layers)) else "Q4_K"


def more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M gives 6 bits to this layer's attn_v, attn_qkv and ffn_down of any kind: the first and last
    eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def mxfp4(name: str, layer: int | None, config: ModelConfig) -> str:
    """llama.cpp's MXFP4_MOE."""
    return "MXFP4" if name.startswith("expert_") else "Q8_0"


def family_of(config: ModelConfig) -> families.Family:
    return families.of_architecture(config.architecture, str(WHERE))


def tensors(config: ModelConfig, format_of: FormatOf = q4_k_m) -> list[TensorInfo]:
    """The tensors that its GGUF file would have, with an output matrix. Vectors and routers are float32."""
    family, found = family_of(config), []
    for name, row, layer in family.tensors_of(config):
        if not row.optional or row.path == ("unembedding",):
            is_plain = len(row.axes) == 1 or not row.quantize
            format = "F32" if is_plain else format_of(row.path[-1], layer, config)
            shape = family.shape(row, config, layer)
            nbytes = math.prod(shape[:-1]) * FORMATS[format].row_bytes(shape[-1])
            found.append(TensorInfo(name, format, shape, WHERE, 0, nbytes))
    return found


def shapes(config: ModelConfig, target: Target, format_of: FormatOf = q4_k_m) -> dict[str, Any]:
    """The parameters that loading such a file makes for a device, as `jax.ShapeDtypeStruct`s without places."""
    file: Any = SimpleNamespace(path=WHERE, tensors={tensor.name: tensor for tensor in tensors(config, format_of)})
    params = abstract_parameters(names.parameters(file, config), Placement.abstract(target))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
