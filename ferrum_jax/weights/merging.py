"""A checkpoint that is read with a LoRA adapter merged into it: W + B A, row by row in float32, rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.quantize import PLAIN, plain_numbers, stored_numbers
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.wrapped import Wrapped, whole_rows

_RUN = 1 << 22  # weights at a time


class Merged(Wrapped):
    """The source `source` with the adapter in the directory `path` merged into it while it is read.

    Raises what `read_adapter` raises, and UnsupportedModelError if a matrix is already quantized.
    """

    def __init__(self, source: ModelSource, path: str | Path) -> None:
        super().__init__(source)
        config = source.config()
        self._factors: dict[TensorInfo, tuple[np.ndarray, np.ndarray]] = {}
        for (layer, parameter), (a, b) in read_adapter(path, config, source).factors.items():
            tensor = source.family.tensors.at(parameter)
            assert tensor is not None  # read_adapter found it in the table
            name = f"blk.{layer}.{tensor.name}"
            info = source.tensors.get(name)
            if info is None:
                raise ModelFileError(f"{source.path}: tensor {source.own_name(name)}: is missing")
            if info.format not in PLAIN:
                raise UnsupportedModelError(
                    f"{info.path}: tensor {source.own_name(name)}: is {info.format}, and merging an adapter would quantize it "
                    "twice; merge into a checkpoint in F32, F16 or BF16, or apply the adapter at run time"
                )
            if source.is_gguf and tensor.gguf_rows:
                reordered = np.empty_like(b)
                reordered[tensor.gguf_rows(config.layers[layer], len(b))] = b
                b = reordered
            self._factors[info] = a, b

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """As `ModelSource.read_into`, but only whole rows of an adapted tensor."""
        self.source.read_into(info, out, start)
        if info not in self._factors:
            return
        a, b = self._factors[info]
        width = info.shape[-1] * PLAIN[info.format].itemsize
        rows = whole_rows(info, start, out.nbytes, width)
        stored = out.reshape(-1, width)
        count = max(1, _RUN // info.shape[-1])
        for first in range(0, len(rows), count):
            part = stored[first : first + count]
            with np.errstate(over="ignore", invalid="ignore"):
                values = plain_numbers(part.view(PLAIN[info.format]), info.format) + _product(b, a, rows[first : first + count])
            try:
                if not np.isfinite(values).all():
                    raise ValueError("holds values that are not finite")
                part[:] = stored_numbers(values, info.format)
            except ValueError as error:
                raise ModelFileError(f"{info.path}: tensor {info.name}: with the adapter it {error}") from None


def _product(b: np.ndarray, a: np.ndarray, rows: range) -> np.ndarray:
    """Some rows of B A, float32 [rows, columns]; those of several matrices, [matrices, ...], are counted through."""
    if b.ndim == 2:
        return b[rows] @ a
    size = b.shape[1]
    parts = range(rows.start // size, -(-rows.stop // size))
    return np.concatenate([b[i, max(0, rows.start - i * size) : min(size, rows.stop - i * size)] @ a[i] for i in parts])
