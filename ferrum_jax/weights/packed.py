"""Matrices of GPTQ, AWQ and compressed-tensors checkpoints, repacked without loss into block formats while they are read.

All three store integers in groups along a row, each group with one scale and one zero point; they differ in how the integers
are arranged in 32-bit words. The idea: unpack the words, then write blocks. The block format of a matrix follows from its small
tensors when the checkpoint is opened: Q4_0 or Q8_0, which have fast kernels, if every zero point is the middle and every scale
a half; else U4 or U8 (pallas_kernels.blocks.groups). Columns that are not in the order of their groups (`desc_act`) are sorted
by group, and the order is kept with the matrix.

The stored data override the header: the order of columns, the zero points, and whether a symmetric GPTQ matrix stores its zero
points minus one. Needs only NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.schemes import SIZES, Scheme

Read = Callable[[TensorInfo], np.ndarray]  # the raw bytes of a tensor of a file

SUFFIXES = frozenset(
    (
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    )
)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in its word of each of eight neighboring columns
_SCALES = {"F16": 2, "BF16": 2, "F32": 4}
_CHUNK = 4 << 20  # weights unpacked at a time


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, columns] as stored in a file, and the format that it becomes.

    codes, scales, zeros, groups: tensors of the file; zeros and groups (the group of each column) may be absent. middle: every
    zero point is the middle of the codes; halves: every scale is a half-precision number.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    codes: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None
    groups: TensorInfo | None
    middle: bool
    halves: bool
    ordered: bool

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def is_plain(self) -> bool:
        """Whether it fits a ggml format exactly."""
        return self.middle and self.halves

    @property
    def format(self) -> str:
        """The name of the block format it becomes."""
        if self.is_plain:
            return f"Q{self.scheme.bits}_0"
        return f"U{self.scheme.bits}_{self._block_size}_{self.scales.format}"

    @property
    def _block_size(self) -> int:
        return 32 if self.is_plain else next(size for size in SIZES if self.group_size % size == 0)

    @property
    def _block_bytes(self) -> int:
        numbers = self._block_size * self.scheme.bits // 8
        return numbers + (2 if self.is_plain else _SCALES[self.scales.format] + self.scheme.bits // 4)

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self.shape[0] * (self.shape[1] // self._block_size) * self._block_bytes

    def order(self, read: Read) -> np.ndarray:
        """int32 [columns]: the columns sorted by group, which is their order in the blocks."""
        if self.groups is None:
            return np.arange(self.shape[1], dtype=np.int32)
        return np.argsort(read(self.groups).view("<i4"), kind="stable").astype(np.int32)

    def read_range(self, read: Read, out: np.ndarray, start: int) -> None:
        """Fills `out` with the bytes of the blocks from `start` on. Even for a part all blocks are unpacked."""
        whole = out.nbytes == self.nbytes
        blocks = out.reshape(-1) if whole else np.empty(self.nbytes, np.uint8)
        self._write_blocks(read, blocks.reshape(self.shape[0], -1, self._block_bytes))
        if not whole:
            out.reshape(-1)[...] = blocks[start : start + out.nbytes]

    def _write_blocks(self, read: Read, blocks: np.ndarray) -> None:
        """blocks uint8 [rows, blocks per row, bytes]."""
        rows, columns = self.shape
        bits = self.scheme.bits
        codes = read(self.codes).view("<u4").reshape(self.codes.shape)
        order = self.order(read) if self.ordered else None
        scales = self._by_block(_bits_of(read(self.scales), self.scales, self._rows_first, self.is_plain))
        zeros = None if self.is_plain else self._by_block(zero_points(self, read))
        width = scales.dtype.itemsize
        count = max(1, _CHUNK // columns)
        for first in range(0, rows, count):
            part = slice(first, min(first + count, rows))
            numbers = _codes(self.scheme, codes, part, order)
            made = blocks[part]
            made[..., :width] = np.ascontiguousarray(scales[part])[..., None].view(np.uint8)
            tail = made[..., width:]
            if zeros is not None:
                tail[..., : bits // 4] = zeros[part].astype(f"<u{bits // 4}")[..., None].view(np.uint8)
                tail = tail[..., bits // 4 :]
            if bits == 4:
                low, high = np.moveaxis(numbers.reshape(-1, 2, 16), 1, 0)
                tail[...] = (low | (high << 4)).reshape(tail.shape)
            else:
                tail[...] = (numbers ^ 0x80 if self.is_plain else numbers).reshape(tail.shape)

    @property
    def _rows_first(self) -> bool:
        return self.scheme.method == "compressed-tensors"

    def _by_block(self, values: np.ndarray) -> np.ndarray:
        """[rows, groups] -> [rows, blocks per row]."""
        return np.repeat(values, self.group_size // self._block_size, axis=1)


def zero_points(matrix: PackedMatrix, read: Read) -> np.ndarray:
    """int32 [rows, groups], to be subtracted from unsigned codes."""
    scheme, (rows, columns) = matrix.scheme, matrix.shape
    groups = columns // matrix.group_size
    if matrix.zeros is None:
        return np.full((rows, groups), 1 << (scheme.bits - 1), np.int32)
    raw = read(matrix.zeros)
    if matrix.zeros.format == "I8":
        return raw.view(np.int8).reshape(rows, groups).astype(np.int32) + (1 << (scheme.bits - 1))
    words = raw.view("<u4").reshape(matrix.zeros.shape)
    if scheme.method == "compressed-tensors":
        return _spread(words.T, scheme.bits).T.astype(np.int32)[:rows]
    return _spread(words, scheme.bits, _AWQ_ORDER if scheme.method == "awq" else None).T.astype(np.int32) + scheme.zero_shift


def _codes(scheme: Scheme, words: np.ndarray, rows: slice, order: np.ndarray | None) -> np.ndarray:
    """The unsigned numbers of some rows: uint8 [rows, columns], the columns in `order`."""
    if scheme.method == "awq":  # words along the rows, columns first
        first, last = rows.start // 8, -(-rows.stop // 8)
        words = np.ascontiguousarray(words[:, first:last].T)
        numbers = np.empty((last - first, 8, words.shape[1]), np.uint8)
        for i, place in enumerate(_AWQ_ORDER):
            numbers[:, i] = (words >> np.uint32(4 * place)) & np.uint32(15)
        numbers = numbers.reshape(-1, words.shape[1])[rows.start - 8 * first : rows.stop - 8 * first]
    else:  # words along the columns; gptq has rows last
        numbers = _spread(words[:, rows].T if scheme.method == "gptq" else words[rows], scheme.bits)
    return numbers if order is None else np.take(numbers, order, axis=1)


def _spread(words: np.ndarray, bits: int, places: Sequence[int] | None = None) -> np.ndarray:
    """The numbers in the words of the last axis, lowest bits first or at `places`: uint8 [..., words * 32 / bits]."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)
    if places is not None:
        raw = raw.reshape(*raw.shape[:-1], -1, len(places))[..., list(places)].reshape(raw.shape)
    return raw


def _bits_of(raw: np.ndarray, info: TensorInfo, rows_first: bool, as_half: bool) -> np.ndarray:
    """The bits of scales [rows, groups], in half precision if `as_half` (exactly: that was checked before)."""
    kind = {"F16": "<u2", "BF16": "<u2", "F32": "<u4"}[info.format]
    bits = raw.view(kind).reshape(info.shape)
    bits = bits if rows_first else bits.T
    return _numbers(bits, info.format).astype("<f2").view("<u2") if as_half and info.format != "F16" else bits


def _numbers(bits: np.ndarray, format: str) -> np.ndarray:
    if format == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view("<f2" if format == "F16" else "<f4")


# Opening


def packed_matrix(name: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, read: Read | None) -> PackedMatrix:
    """The matrix of module `name`, made from its tensors by suffix and checked. read: None if there are no tensor data."""
    path = next(iter(tensors.values())).path

    def error(suffix: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{path}: tensor {name}.{suffix}: {problem}")

    def tensor(suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...], optional: bool = False) -> TensorInfo | None:
        info = tensors.get(suffix)
        if info is None:
            if optional:
                return None
            raise error(suffix, "is missing")
        if info.format not in dtypes:
            raise error(suffix, f"is {info.format} where {' or '.join(dtypes)} is expected")
        if info.shape != shape:
            raise error(suffix, f"shape {list(info.shape)}; expected {list(shape)}")
        return info

    each = 32 // scheme.bits
    compressed = scheme.method == "compressed-tensors"
    main = "weight_packed" if compressed else "qweight"
    codes = tensors.get(main)
    if codes is None:
        raise error(main, "is missing")
    if codes.format != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        raise error(main, f"is {codes.format} {list(codes.shape)} where I32 of two axes is expected")
    first, second = codes.shape
    if compressed:
        rows, columns = first, second * each
    elif scheme.method == "gptq":
        rows, columns = second, first * each
    else:
        rows, columns = second * each, first
    size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % size or size % SIZES[-1] or (rows % each and not compressed):
        raise UnsupportedModelError(
            f"{path}: tensor {name}.{main}: [{rows}, {columns}] in groups of {size} is not supported: groups of a multiple of "
            f"{SIZES[-1]} columns that fill a row are, and rows that fill 32-bit words"
        )
    groups = columns // size
    unknown = tensors.keys() - SUFFIXES
    if unknown:
        raise error(min(unknown), "is unknown in a packed matrix")
    dtypes = tuple(_SCALES)
    if compressed:
        scales = tensor("weight_scale", dtypes, (rows, groups))
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            shape = (rows, groups) if zeros.format == "I8" else (-(-rows // each), groups)
            tensor("weight_zero_point", ("I32", "I8"), shape)
        by_column = tensor("weight_g_idx", ("I32",), (columns,), optional=True)
        stated = tensor("weight_shape", ("I64", "I32"), (2,), optional=True)
        if stated is not None and read is not None:
            values = read(stated).view("<i8" if stated.format == "I64" else "<i4").tolist()
            if values != [rows, columns]:
                raise error("weight_shape", f"is {values}, but weight_packed holds {[rows, columns]}")
    else:
        scales = tensor("scales", dtypes, (groups, rows))
        zeros = tensor("qzeros", ("I32",), (groups, rows // each))
        by_column = tensor("g_idx", ("I32",), (columns,), optional=True)
    assert scales is not None
    made = PackedMatrix(
        name, scheme, (rows, columns), codes, scales, zeros, by_column, scheme.symmetric, scales.format == "F16", False
    )
    if read is None:
        return dataclasses.replace(made, ordered=scheme.ordered and by_column is not None and groups > 1)
    points = zero_points(made, read)
    if scheme.method == "gptq" and points.min() == points.max():  # symmetric: stores the middle, or the middle minus one
        stored = int(points.min()) - scheme.zero_shift
        if (shift := (1 << (scheme.bits - 1)) - stored) in (0, 1):
            made = dataclasses.replace(made, scheme=dataclasses.replace(scheme, zero_shift=shift))
            points = zero_points(made, read)
    if zeros is not None and not 0 <= points.min() <= points.max() <= 1 << scheme.bits:
        raise error(zeros.name.rpartition(".")[2], f"holds zero points outside 0 to {1 << scheme.bits}")
    middle = bool((points == 1 << (scheme.bits - 1)).all())
    numbers = _scales(read(scales), scales)
    if not np.isfinite(numbers).all():
        raise error(scales.name.rpartition(".")[2], "holds scales that are not finite; the file is damaged")
    halves = made.halves or _are_halves(numbers)
    return dataclasses.replace(made, middle=middle, halves=halves, ordered=_is_ordered(made, groups, size, read, error))


def agreeing(matrices: Sequence[PackedMatrix]) -> list[PackedMatrix]:
    """The matrices of one stack (the experts of a layer), all with the format and order that fits every one of them."""
    middle, halves = all(m.middle for m in matrices), all(m.halves for m in matrices)
    ordered = any(m.ordered for m in matrices)
    return [dataclasses.replace(m, middle=middle, halves=halves, ordered=ordered) for m in matrices]


def _scales(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    return _numbers(raw.view("<u4" if info.format == "F32" else "<u2"), info.format)


def _are_halves(numbers: np.ndarray) -> bool:
    numbers = numbers.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((numbers.astype(np.float16).astype(np.float32) == numbers).all())


def _is_ordered(matrix: PackedMatrix, groups: int, size: int, read: Read, error: Callable[[str, str], ModelFileError]) -> bool:
    """Whether columns are not in the order of their groups. Every group must have its full number of columns."""
    if matrix.groups is None:
        return False
    of_column = read(matrix.groups).view("<i4")
    if (of_column == -1).all() or (of_column == np.arange(of_column.size) // size).all():
        return False
    if of_column.min() < 0 or of_column.max() >= groups or (np.bincount(of_column, minlength=groups) != size).any():
        suffix = matrix.groups.name.rpartition(".")[2]
        raise error(suffix, f"does not put {size} columns into each of the groups from 0 to {groups - 1}")
    return True
