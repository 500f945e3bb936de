"""The base of sources that read another checkpoint and change its matrices on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.opened import Opened
from ferrum_jax.weights.source import ModelSource

if TYPE_CHECKING:
    from ferrum_jax.config import EncoderConfig, ModelConfig
    from ferrum_jax.families import Family
    from ferrum_jax.files.metadata import Typed
    from ferrum_jax.tokenizer import Tokenizer


class Wrapped(Opened):
    """Behaves like `source` in everything; a subclass changes `tensors` or `read_into`."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.path, self.parts = source, source.path, source.parts
        self.metadata, self.is_gguf, self.checks_scales = source.metadata, source.is_gguf, source.checks_scales
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self.passed_over = source.passed_over

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def tokenizer_directory(self) -> Path:
        return self.source.tokenizer_directory

    def typed_metadata(self) -> dict[str, Typed]:
        return self.source.typed_metadata()

    def config(self) -> ModelConfig:
        return self.source.config()

    def encoder(self) -> EncoderConfig | None:
        return self.source.encoder()

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def own_name(self, name: str) -> str:
        return self.source.own_name(name)

    def close(self) -> None:
        """Closes every file."""
        self.source.close()


def innermost(source: ModelSource) -> ModelSource:
    """The wrapped checkpoint itself."""
    while isinstance(source, Wrapped):
        source = source.source
    return source


def whole_rows(info: TensorInfo, start: int, nbytes: int, width: int) -> range:
    """The rows of `width` bytes at [start, start + nbytes). ValueError if these are not whole rows."""
    if start % width or nbytes % width:
        raise ValueError(f"bytes [{start}, {start + nbytes}) of tensor {info.name!r} are not whole rows of {width}")
    return range(start // width, (start + nbytes) // width)
