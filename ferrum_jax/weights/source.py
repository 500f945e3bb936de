"""`ModelSource`: the interface of every checkpoint, however it is stored.

The one idea: a checkpoint is a table of tensors with the names of GGUF files, each in a block format, and a way to read their
bytes. A GGUF file is exactly that; a Hugging Face directory is presented in the same way, with experts stacked and foreign
packings repacked while they are read. So code that loads, describes or converts a model handles one kind of object.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from ferrum_jax.files.tensor_info import TensorInfo

if TYPE_CHECKING:
    from ferrum_jax.config import EncoderConfig, ModelConfig
    from ferrum_jax.families import Family
    from ferrum_jax.files.metadata import Typed
    from ferrum_jax.tokenizer import Tokenizer

MARKER = "ferrum_jax.json"
"""The file that distinguishes a directory written by ferrum_jax from a Hugging Face directory."""


class ModelSource(Protocol):
    """An open checkpoint, its headers checked; a context manager that closes its files.

    path: the (first) file, or the directory; parts: all files with tensors. metadata: facts about the model under the keys of
    GGUF, with `general.architecture` and `general.name` if known. tensors: by the names of the family's table.
    passed_over: tensors of vision and of multi-token prediction, which are not read. is_gguf: rows are in the order of GGUF
    files, and norms and routers in the formats that llama.cpp reads. checks_scales: reading blocks detects scales that are not
    finite.
    """

    @property
    def path(self) -> Path: ...

    @property
    def parts(self) -> tuple[Path, ...]: ...

    @property
    def metadata(self) -> Mapping[str, object]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def passed_over(self) -> Mapping[str, TensorInfo]: ...

    @property
    def is_gguf(self) -> bool: ...

    @property
    def checks_scales(self) -> bool: ...

    @property
    def family(self) -> Family:
        """The model's family. Raises ModelFileError or UnsupportedModelError."""
        ...

    @property
    def tokenizer_directory(self) -> Path:
        """The directory of its tokenizer files, if the metadata hold no tokenizer."""
        ...

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as they are read."""
        ...

    def config(self) -> ModelConfig:
        """The configuration of a decoder. Raises ModelFileError or UnsupportedModelError naming the key."""
        ...

    def encoder(self) -> EncoderConfig | None:
        """The configuration of an encoder (BERT), or None for a decoder. Raises like `config`."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, chat template included. Raises ModelFileError or UnsupportedModelError naming the file or key."""
        ...

    def typed_metadata(self) -> dict[str, Typed]:
        """The metadata with their types in GGUF files; only the texts if the source has no such types."""
        ...

    def own_name(self, name: str) -> str:
        """The checkpoint's own name for the tensor `name`, for error messages."""
        ...

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """Fills the contiguous uint8 array `out` with the bytes [start, start + out.nbytes) of the tensor.

        Raises ModelFileError if the file has become shorter or is only a header, ValueError for an unsuitable array or range or
        a closed file.
        """
        ...

    def packed(self, info: TensorInfo, memory_layout: str) -> tuple[np.ndarray, ...] | None:
        """The planes of a tensor's blocks, [*experts, *plane] each, if they are stored in that memory layout, else None."""
        ...

    def read(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes]."""
        ...

    def close(self) -> None:
        """Closes every file; reading afterwards raises ValueError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...
