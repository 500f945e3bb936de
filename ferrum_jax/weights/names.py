"""Which tensor of a checkpoint is which parameter, from a comparison of the checkpoint with the table of its family.

The result of `parameters(source, config)` names every tensor exactly once; a tensor that is missing, unknown or of the wrong
shape is an error, raised before any weights are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ferrum_jax import families
from ferrum_jax.config import EncoderConfig, ModelConfig
from ferrum_jax.distributed import Axis
from ferrum_jax.errors import ModelFileError
from ferrum_jax.families.table import Path
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.source import ModelSource

__all__ = ["Parameters", "Path", "is_plain", "kept_format", "kinds_of", "parameters"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The tensors of a checkpoint by parameter path: one each in `whole`, one per layer (or None) in `stacked`. axes: what the
    dimensions of each tensor are. rows: for tensors whose rows are in another order than the parameter's, int [rows] gives
    the tensor's row for each row of the parameter."""

    whole: dict[Path, TensorInfo]
    stacked: dict[Path, tuple[TensorInfo | None, ...]]
    axes: dict[TensorInfo, tuple[Axis, ...]]
    rows: dict[TensorInfo, np.ndarray]

    @property
    def layer_formats(self) -> list[tuple[str, ...]]:
        """The kinds of each layer's parameters: layers of equal kinds share a compiled body."""
        return list(zip(*map(kinds_of, self.stacked.values()), strict=True))


def is_plain(tensor: TensorInfo) -> bool:
    """Whether a tensor is not multiplied: a norm, a bias, one of each expert included."""
    return len(tensor.shape) == 1 or tensor.name.endswith("bias")


def kept_format(tensor: TensorInfo) -> str:
    """The format a tensor has on the device: its own, but norms and biases become float32."""
    return "F32" if is_plain(tensor) else tensor.format


def kinds_of(tensors: Sequence[TensorInfo | None]) -> tuple[str, ...]:
    """The kind of each tensor ("" for None); tensors of equal kinds can share a stack. It states the format kept, whether
    columns are in another order, and the shape if it is not the first tensor's."""
    first = next((tensor.shape for tensor in tensors if tensor), ())

    def kind(tensor: TensorInfo) -> str:
        shape = "" if tensor.shape == first else f" {list(tensor.shape)}"
        return kept_format(tensor) + ("+order" if tensor.order else "") + shape

    return tuple(kind(tensor) if tensor else "" for tensor in tensors)


def parameters(source: ModelSource, config: ModelConfig | EncoderConfig) -> Parameters:
    """Assigns every tensor of the checkpoint to its parameter. Raises `ModelFileError` naming a tensor that is missing, unknown
    or of the wrong shape."""
    family = families.of_architecture(config.architecture, str(source.path))
    whole: dict[Path, TensorInfo] = {}
    layers: dict[Path, list[TensorInfo | None]] = {}
    axes: dict[TensorInfo, tuple[Axis, ...]] = {}
    order: dict[TensorInfo, np.ndarray] = {}
    for name, tensor in source.tensors.items():
        row, layer = family.tensors.find(name)
        if layer is not None and layer >= config.num_layers:
            raise ModelFileError(f"{source.path}: tensor {tensor.name}: the model has only {config.num_layers} layers")
        if row is None or not (layer is None or row.layers(config.layers[layer])):
            raise ModelFileError(
                f"{source.path}: tensor {tensor.name}: is unknown in a model of architecture {config.architecture}"
            )
        expected = family.shape(row, config, layer)
        if tensor.shape != expected:
            raise ModelFileError(
                f"{source.path}: tensor {tensor.name}: shape {list(tensor.shape)}; expected {list(expected)} "
                f"({', '.join(row.axes)}) by the model's configuration"
            )
        axes[tensor] = tuple(map(Axis, row.axes, family.runs(row, config, layer)))
        if layer is None:
            whole[row.path] = tensor
            continue
        layers.setdefault(row.path, [None] * config.num_layers)[layer] = tensor
        if row.gguf_rows and source.is_gguf:
            order[tensor] = row.gguf_rows(config.layers[layer], expected[0])

    for name, row, layer in family.tensors_of(config):
        stacked = layers.get(row.path)
        is_missing = row.path not in whole if layer is None else stacked is None or stacked[layer] is None
        if is_missing and (stacked is not None or not row.optional):
            raise ModelFileError(f"{source.path}: tensor {source.own_name(name)}: is missing")
    return Parameters(whole, {path: tuple(tensors) for path, tensors in layers.items()}, axes, order)
