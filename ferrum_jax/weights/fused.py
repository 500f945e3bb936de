"""The parts of a tensor that holds all experts of a layer, as in directories of newer versions of transformers.

Usually a part is a run of bytes of each expert. It is not if rows of gate and up alternate, if rows are the last axis, or if
the tensor is a pair of MXFP4 tensors, codes and scales. Then a whole expert is read, and its part is cut out in memory; blocks
of MXFP4 get ggml's order, and no number changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.table import Part
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.quantize import PLAIN

BLOCKS, SCALES = "_blocks", "_scales"  # suffixes of the name of a tensor in MXFP4
_BLOCK = 32  # weights
_NAN = 255  # of a scale

Read = Callable[[TensorInfo, int, int], np.ndarray]  # bytes of a tensor of a file, from an offset on
Error = Callable[[str, str], ModelFileError]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Bytes of one tensor of a file, unchanged and in its `format`."""

    info: TensorInfo
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def format(self) -> str:
        return self.info.format


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of one expert that is not a run of bytes. count: the parts of the tensor, of which this is `part.index`; scales:
    of the blocks in `info`, MXFP4."""

    info: TensorInfo
    shape: tuple[int, ...]
    expert: int
    part: Part
    count: int
    scales: TensorInfo | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def format(self) -> str:
        return "MXFP4" if self.scales else self.info.format

    @property
    def nbytes(self) -> int:
        numbers = math.prod(self.shape)
        return numbers // _BLOCK * 17 if self.scales else numbers * PLAIN[self.info.format].itemsize

    def read_range(self, read: Read, out: np.ndarray, start: int) -> None:
        """Fills `out` with the bytes from `start` on; the expert is read whole for a part."""
        made = self._blocks(read) if self.scales else self._numbers(read)
        out.reshape(-1)[...] = made.reshape(-1).view(np.uint8)[start : start + out.nbytes]

    def _one(self, info: TensorInfo, read: Read, kind: np.dtype) -> np.ndarray:
        size = info.nbytes // info.shape[0]
        return read(info, self.expert * size, size).view(kind).reshape(info.shape[1:])

    def _own(self, rows: np.ndarray) -> np.ndarray:
        if self.part.interleaved:
            return rows[self.part.index :: self.count]
        size = len(rows) // self.count
        return rows[self.part.index * size : (self.part.index + 1) * size]

    def _numbers(self, read: Read) -> np.ndarray:
        rows = self._one(self.info, read, PLAIN[self.info.format])
        return np.ascontiguousarray(self._own(rows.T if self.part.rows_last else rows))

    def _blocks(self, read: Read) -> np.ndarray:
        """uint8 [rows, blocks, 17]: the scale, then byte i with numbers i and i + 16; in the file byte i has 2i and 2i + 1."""
        assert self.scales is not None
        codes = self._own(self._one(self.info, read, np.dtype(np.uint8)))
        scales = self._own(self._one(self.scales, read, np.dtype(np.uint8)))
        if (scales == _NAN).any():
            raise ModelFileError(
                f"{self.scales.path}: tensor {self.scales.name}: holds scales that are no number; the file is damaged: "
                "download it again"
            )
        first, second = codes[..., :8], codes[..., 8:]
        made = np.empty((*codes.shape[:-1], 17), np.uint8)
        made[..., 0] = scales
        made[..., 1::2] = (first & 15) | (second << 4)
        made[..., 2::2] = (first >> 4) | (second & 0xF0)
        return made


def fused(
    parts: Mapping[str, Sequence[tuple[str, Part]]],
    tensors: Mapping[str, TensorInfo],
    packed: bool,
    model_class: str,
    error: Error,
) -> Iterator[tuple[str, int, Slice | Cut]]:
    """(name in the table, number of the expert or -1, part) of the tensors of one module by suffix. parts: the names of what
    each tensor holds and the `Part` that it is; packed: tensors may be MXFP4. error(name of a tensor, problem) makes one."""
    for suffix, info in tensors.items():
        stem = suffix.removesuffix(BLOCKS).removesuffix(SCALES) if packed else suffix
        members = parts.get(stem, ())
        shape = info.shape
        if not members:
            raise error(info.name, f"is unknown in a {model_class}")
        if suffix == stem + SCALES:
            if stem + BLOCKS not in tensors:
                raise error(info.name, "is there without its blocks")
            continue
        scales = _scales(tensors.get(stem + SCALES), info, error) if suffix == stem + BLOCKS else None
        if scales is not None:
            shape = (*shape[:2], shape[2] * _BLOCK)
        elif info.format not in PLAIN:
            raise UnsupportedModelError(f"{info.path}: tensor {info.name}: dtype {info.format} is not supported")
        if members[0][1].whole:
            yield members[0][0], -1, Slice(info, shape, 0, info.nbytes)
            continue
        count = len(members)
        if len(shape) not in (2, 3) or 0 in shape:
            raise error(info.name, f"shape {list(shape)} is not [experts, rows, columns] or [experts, rows]")
        experts, *rest = shape
        turned = members[0][1].rows_last and scales is None and len(rest) == 2
        rows, *columns = rest[::-1] if turned else rest
        if rows % count:
            raise error(info.name, f"shape {list(shape)} does not hold {count} parts")
        nbytes = info.nbytes // experts // count
        for number in range(experts):
            for i, (name, part) in enumerate(members):
                own = (rows // count, *columns)
                if turned or part.interleaved or scales is not None:
                    yield name, number, Cut(info, own, number, part, count, scales)
                else:
                    yield name, number, Slice(info, own, (number * count + i) * nbytes, nbytes)


def _scales(scales: TensorInfo | None, blocks: TensorInfo, error: Error) -> TensorInfo:
    """The scales of blocks uint8 [experts, rows, blocks of a row, 16], checked."""
    if scales is None:
        raise error(blocks.name, "is there without its scales")
    if blocks.format != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK // 2:
        raise error(blocks.name, f"is {blocks.format} {list(blocks.shape)}, not U8 [experts, rows, blocks, {_BLOCK // 2}]")
    if scales.format != "U8" or scales.shape != blocks.shape[:3]:
        raise error(scales.name, f"is {scales.format} {list(scales.shape)}, not U8 {list(blocks.shape[:3])}")
    return scales
