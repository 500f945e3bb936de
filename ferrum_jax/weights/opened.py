"""What open checkpoints have in common, and reading tensors by position straight into the caller's array."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from ferrum_jax.config import EncoderConfig, ModelConfig, refuse_encoder
from ferrum_jax.errors import ModelFileError
from ferrum_jax.families import Family
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo

_READ_BYTES = 16 << 20  # per positioned read


class Opened:
    """What most open checkpoints (`ModelSource`s) have in common: reading whole tensors, and closing files at the end of a
    `with`."""

    is_gguf, checks_scales = False, True
    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    passed_over: Mapping[str, TensorInfo] = {}
    _files: Mapping[Path, io.FileIO] = {}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as they are read."""
        return sum(info.nbytes + (info.order.nbytes if info.order else 0) for info in self.tensors.values())

    @property
    def tokenizer_directory(self) -> Path:
        """As `ModelSource.tokenizer_directory`."""
        return self.path

    def typed_metadata(self) -> dict[str, Typed]:
        """As `ModelSource.typed_metadata`."""
        return {key: Typed(value, "string") for key, value in self.metadata.items() if isinstance(value, str) and value}

    def packed(self, info: TensorInfo, memory_layout: str) -> tuple[np.ndarray, ...] | None:
        """As `ModelSource.packed`."""
        return None

    @property
    def family(self) -> Family:
        """As `ModelSource.family`."""
        raise NotImplementedError

    def read_config(self) -> Any:
        """The configuration, whatever the family."""
        raise NotImplementedError

    def config(self) -> ModelConfig:
        """As `ModelSource.config`."""
        if self.family.embeds:
            raise refuse_encoder(self.path)
        return self.read_config()

    def encoder(self) -> EncoderConfig | None:
        """As `ModelSource.encoder`."""
        return self.read_config() if self.family.embeds else None

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """As `ModelSource.read_into`."""
        raise NotImplementedError

    def read(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes]."""
        out = np.empty(info.nbytes, np.uint8)
        self.read_into(info, out)
        return out

    def close(self) -> None:
        """Closes every file; reading afterwards raises ValueError."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def checked_range(info: TensorInfo, out: np.ndarray, start: int) -> None:
    """Raises ValueError unless `out` is a writable contiguous uint8 array that fits into the tensor from `start` on."""
    if out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"read_into needs a writeable contiguous uint8 array, got {out.dtype} {out.shape}")
    if not 0 <= start <= info.nbytes - out.nbytes:
        raise ValueError(
            f"bytes [{start}, {start + out.nbytes}) are not within the {info.nbytes} bytes of tensor {info.name!r}"
        )


def read_range(file: io.FileIO, info: TensorInfo, out: np.ndarray, start: int) -> None:
    """Fills `out` with the bytes of the tensor from `start` on, as stored in `file`. ModelFileError if the file ends early."""
    view = out.reshape(-1).data
    fd = file.fileno()
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _READ_BYTES]], info.offset + start + done)
        if got == 0:
            raise ModelFileError(
                f"{info.path}: the file ends inside tensor {info.name!r}, after {start + done} of its "
                f"{info.nbytes} bytes: it changed after it was opened; download it again"
            )
        done += got
