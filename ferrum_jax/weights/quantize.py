"""A checkpoint that is quantized while it is read: `Quantized` wraps a source and returns its matrices as blocks.

Every matrix is read, quantized and returned in runs of rows, on all cores, so neither the original nor a float32 copy is ever
in memory as a whole. The format of a tensor depends only on its name and width (`format_of`), so it is known, and its memory
counted, before anything is read.
"""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.table import Table
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights import ggml_types
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.wrapped import Wrapped, whole_rows

QUANTIZATIONS = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
PLAIN: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_RUN = 1 << 18  # weights that a thread reads and quantizes at a time
_MIXES = ("_s", "_m", "_l", "_xl")
_FILE_TYPES = {"Q2_K": "Q2_K_S", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # llama.cpp's names for unmixed files


def checked_format(name: str | None) -> str | None:
    """The block format that `quantize=` means, or None for None. ValueError for any other name."""
    if name is None or (isinstance(name, str) and name.lower() in QUANTIZATIONS):
        return name and name.upper()
    known = ", ".join(QUANTIZATIONS)
    if isinstance(name, str) and name.lower().endswith(_MIXES) and (base := name.lower().rpartition("_")[0]) in QUANTIZATIONS:
        raise ValueError(f"quantize {name!r} is a mix of formats, which is not supported; {base!r} gives all matrices that one")
    raise ValueError(f"quantize {name!r} is not supported; supported: {known}")


def format_of(name: str, tensor: TensorInfo, format: str, tied: bool, table: Table) -> str:
    """The format that a tensor gets when a model is quantized to `format`; its own format if it is not a matrix.

    As in llama.cpp, norms, biases, positions, token types and the router are not quantized, and the output matrix (or a tied
    embedding) gets at least Q6_K. If the blocks do not fill a row evenly, the format is Q8_0, or else F16."""
    if len(tensor.shape) == 1:
        return tensor.format
    row, _ = table.find(name)
    if row is not None and not row.quantize:
        return "F32" if tensor.format in PLAIN else tensor.format
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        format = "Q8_0" if format == "Q8_0" else "Q6_K"
    columns = tensor.shape[-1]
    fitting = (f for f in (format, "Q8_0", "F16") if columns % ggml_types.BY_NAME[f].block_size == 0)
    return next(fitting)


class Quantized(Wrapped):
    """The source `source` with its matrices quantized to `format` ("Q4_K") while they are read."""

    def __init__(self, source: ModelSource, format: str) -> None:
        super().__init__(source)
        self.checks_scales, self.format = True, format
        tied = "output.weight" not in source.tensors
        tensors: dict[str, TensorInfo] = {}
        self._originals: dict[TensorInfo, TensorInfo] = {}
        for name, info in source.tensors.items():
            wanted = ggml_types.BY_NAME[format_of(name, info, format, tied, source.family.tensors)]
            if info.format != wanted.name and info.format not in PLAIN:
                raise UnsupportedModelError(
                    f"{info.path}: tensor {source.own_name(name)}: is {info.format} already and would lose twice as "
                    f"{wanted.name}; quantize a checkpoint in F32, F16 or BF16, or load this one as it is"
                )
            nbytes = math.prod(info.shape) // wanted.block_size * wanted.block_bytes
            tensors[name] = dataclasses.replace(info, format=wanted.name, nbytes=nbytes)
            self._originals[tensors[name]] = info
        self.tensors = tensors

    def typed_metadata(self) -> dict[str, Typed]:
        """The source's metadata, with llama.cpp's name for such a file."""
        import gguf  # not needed for loading

        mix = gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES.get(self.format, self.format)}"]
        version = Typed(gguf.GGML_QUANT_VERSION, "uint32")
        stated = {"general.file_type": Typed(int(mix), "uint32"), "general.quantization_version": version}
        return self.source.typed_metadata() | stated

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """As `ModelSource.read_into`, but only whole rows of a quantized tensor."""
        original = self._originals.get(info, info)
        if original.format == info.format:
            self.source.read_into(original, out, start)
            return
        columns, kind = info.shape[-1], ggml_types.BY_NAME[info.format]
        width = columns // kind.block_size * kind.block_bytes
        rows, first = out.reshape(-1, width), whole_rows(info, start, out.nbytes, width).start
        count = max(1, _RUN // columns)

        def run(begin: int) -> None:
            part = rows[begin : begin + count]
            part[:] = self._rows(original, info.format, first + begin, len(part))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(run, range(0, len(rows), count)):
                pass

    def _rows(self, original: TensorInfo, format: str, first: int, count: int) -> np.ndarray:
        """Rows first .. first + count - 1, quantized: uint8 [count, bytes]."""
        from pallas_kernels.blocks.quantize import quantize

        stored = np.empty((count, original.shape[-1]), PLAIN[original.format])
        self.source.read_into(original, stored.view(np.uint8), first * stored.strides[0])
        values = plain_numbers(stored, original.format)
        try:
            return stored_numbers(values, format) if format in PLAIN else quantize(values, format)
        except ValueError as error:
            raise ModelFileError(f"{original.path}: tensor {original.name}: {error}") from None


def plain_numbers(stored: np.ndarray, format: str) -> np.ndarray:
    """The float32 values of F32, F16 or BF16 weights, one element each."""
    if format == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def stored_numbers(values: np.ndarray, format: str) -> np.ndarray:
    """float32 values stored as F32, F16 or BF16, rounded to nearest: uint8 [..., bytes]. ValueError for values beyond F16's
    range."""
    if format == "F16" and not (np.isfinite(values).all() and np.abs(values).max(initial=0) <= 65504):
        raise ValueError("holds values beyond half precision")
    if format == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    return values.astype(PLAIN[format], copy=False).view(np.uint8)
