"""`Family`: everything about a family of models in one value. Each file here that is named after a family defines one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_jax.config import EncoderConfig, ModelConfig
from ferrum_jax.errors import ModelFileError
from ferrum_jax.families.fields import FIELDS
from ferrum_jax.families.keys import Keys, is_neutral, shown
from ferrum_jax.families.table import Table, Tensor
from ferrum_jax.files.metadata import Typed

if TYPE_CHECKING:
    from ferrum_jax.files.tensor_info import TensorInfo


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The contents of a config.json. tied: the output matrix is the embedding; biases: the matrices of the layers that must
    have biases, by the stem of the tensor's name; rope_factors: float32 [rope_dim / 2] that divide the rotary frequencies, or
    None; quantization: how matrices are packed, as the file states it, or None. optional: for tensors of layers that the table
    calls optional, by GGUF name, whether layers must have them or must not. predicting: the number of blocks after the layers
    that predict further tokens."""

    family: Family
    config: ModelConfig | EncoderConfig
    tied: bool
    biases: frozenset[str]
    rope_factors: np.ndarray | None = None
    quantization: dict[str, Any] | None = None
    optional: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    predicting: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """The names and tensors of a family, and how a file's keys become a configuration and back.

    architecture: its name in GGUF files and in its configurations; families that share one share a table. model_class,
    model_type: its names in config.json. tensors: its table. sizes(config, spec): the sizes of the axes in the table; `spec` is
    an item of the configuration's `layers` (None: outside the layers). A size is a pair (count, run) if the axis consists of
    runs that belong together, such as the rows of a head.

    from_gguf(family, keys, tensors of the file): the configuration; `keys` are those of the architecture. from_json(family,
    keys, path of config.json). Both read every key that matters and refuse values that they do not support; keys that they do
    not read are judged here. fields: the keys of config.json that transformers' class has; None: those that fields.py lists.
    to_gguf(config, where): the keys that `from_gguf` reads; UnsupportedModelError for what a GGUF file cannot tell llama.cpp.

    vocabulary: the model of their tokenizers in GGUF files, where these merge characters ("llama": by score, "gemma4": by the
    list of merges). embeds: the models make vectors (with an `EncoderConfig`), not text. windows_in_gguf: llama.cpp applies the
    windows of its GGUF files. predicts: GGUF files may have blocks after the layers that predict further tokens; they are
    passed over.
    """

    architecture: str
    model_class: str
    model_type: str
    tensors: Table
    sizes: Callable[[Any, Any], Mapping[str, int | tuple[int, int]]]
    from_gguf: Callable[[Family, Keys, Mapping[str, TensorInfo]], ModelConfig | EncoderConfig]
    from_json: Callable[[Family, Keys, Path], ConfigFile]
    to_gguf: Callable[[Any, str], dict[str, Typed]] | None = None
    fields: Collection[str] | None = None
    vocabulary: str = "llama"
    embeds: bool = False
    windows_in_gguf: bool = False
    predicts: bool = False

    def shape(self, tensor: Tensor, config: Any, layer: int | None) -> tuple[int, ...]:
        """The shape of a tensor of layer `layer`, or of the whole model (None)."""
        return tuple(count * run for count, run in self._axes(tensor, config, layer))

    def runs(self, tensor: Tensor, config: Any, layer: int | None) -> tuple[int, ...]:
        """For each axis of a tensor, how many neighbors belong together."""
        return tuple(run for _, run in self._axes(tensor, config, layer))

    def _axes(self, tensor: Tensor, config: Any, layer: int | None) -> list[tuple[int, int]]:
        sizes = self.sizes(config, None if layer is None else config.layers[layer])
        return [size if isinstance(size, tuple) else (size, 1) for size in (sizes[axis] for axis in tensor.axes)]

    def tensors_of(self, config: Any) -> Iterator[tuple[str, Tensor, int | None]]:
        """Every tensor that such a model has or may have: its name in GGUF files, its row, and its layer or None."""
        for row in self.tensors.whole:
            if any(map(row.layers, config.layers)):
                yield row.name, row, None
        for layer, spec in enumerate(config.layers):
            for row in self.tensors.layer:
                if row.layers(spec):
                    yield f"blk.{layer}.{row.name}", row, layer

    def read_gguf(self, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo], where: str) -> Any:
        """The configuration of a GGUF file, from its metadata and shapes. UnsupportedModelError for a feature that is not
        implemented, ModelFileError for a missing or impossible key."""
        keys = Keys(metadata, f"{self.architecture}.", where)
        keys.ignore("tensor_data_layout")
        config = self.from_gguf(self, keys, tensors)
        keys.judge("this feature is not supported")
        return config

    def read_json(self, content: Mapping[str, Any], path: Path) -> ConfigFile:
        """Reads the object in the config.json at `path`. Raises like `read_gguf`."""
        keys = Keys(content, "", str(path), FIELDS[self.model_type] if self.fields is None else self.fields)
        if not is_neutral(packing := content.get("quantization")):  # written by MLX, whose packing is not supported
            raise keys.unsupported("quantization", f"{shown(packing)} is not supported")
        file = self.from_json(self, keys, path)
        keys.judge(f"{{}} is not supported in a {self.model_class}")
        quantization = content.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise keys.fail("quantization_config", "must be an object")
        return dataclasses.replace(file, quantization=quantization)


def embedding_rows(keys: Keys, tensors: Mapping[str, TensorInfo], name: str = "token_embd.weight") -> int:
    """The number of rows of a matrix that a file must have."""
    if name not in tensors:
        raise ModelFileError(f"{keys.source}: tensor {name}: is missing")
    return tensors[name].shape[0]
