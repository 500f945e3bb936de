"""Tensors of a directory that hold other numbers than GGUF files, or the same in another order, are changed while they are
read; so are those of GGUF files that hold the rows of several tensors.

A table's `Change` says what differs. Rows are read in contiguous runs, so a part of a tensor costs only its own rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.table import Change, Table
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.fused import Error, Read
from ferrum_jax.weights.quantize import PLAIN, plain_numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """A tensor made from one in a file. rows, columns: int, for each one its number in the file (columns None: the same);
    values, turned: as for `Change`; count: rows in the file. Without columns and values it may be in any format; blocks that
    are turned become F32."""

    info: TensorInfo
    shape: tuple[int, ...]
    rows: np.ndarray
    columns: np.ndarray | None
    values: Callable[[np.ndarray], np.ndarray] | None
    count: int
    turned: bool = False

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def format(self) -> str:
        return "F32" if self.values or (self.turned and self.info.format not in PLAIN) else self.info.format

    @property
    def nbytes(self) -> int:
        if self.format in PLAIN:
            return math.prod(self.shape) * PLAIN[self.format].itemsize
        return self.info.nbytes // self.count * len(self.rows)

    def read_range(self, read: Read, out: np.ndarray, start: int) -> None:
        """Fills `out` with the bytes from `start` on."""
        together = self.shape[-1] if self.turned else 1  # the rows of a matrix, if it is transposed
        width, size = self.nbytes // len(self.rows) * together, self.info.nbytes // self.count
        first, last = start // width, -(-(start + out.nbytes) // width)
        rows = self.rows[first * together : last * together]
        stored: np.ndarray = np.empty((len(rows), size), np.uint8)
        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
        for begin, end in itertools.pairwise(cuts):
            part = stored[begin:end]
            part[...] = read(self.info, int(rows[begin]) * size, part.nbytes).reshape(part.shape)
        if self.columns is not None:
            stored = stored.view(PLAIN[self.info.format])[:, self.columns]
        if self.values is not None:
            numbers = stored.view(PLAIN[self.info.format])
            stored = self.values(plain_numbers(numbers, self.info.format)).astype("<f4")
        if self.turned:
            numbers = stored.view(PLAIN[self.format]) if self.format == self.info.format else _unpacked(stored, self.info)
            stored = numbers.reshape(last - first, together, -1).swapaxes(1, 2)
        flat = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        out.reshape(-1)[...] = flat[start - first * width :][: out.nbytes]


def _unpacked(stored: np.ndarray, info: TensorInfo) -> np.ndarray:
    """float32 [rows, columns] of blocks uint8 [rows, bytes]. ModelFileError for numbers that are not finite."""
    from pallas_kernels.blocks import unpack  # imports JAX, which is not needed to read a header

    numbers = np.asarray(unpack(stored, info.format))
    if not np.isfinite(numbers).all():
        text = f"holds blocks ({info.format}) that are not finite; the file is damaged: download it again"
        raise ModelFileError(f"{info.path}: tensor {info.name!r}: {text}")
    return numbers


def _by_matrix(rows: np.ndarray, columns: int, change: Change, spec: Any) -> tuple[int, ...]:
    """The shape of rows that are of several matrices."""
    assert change.matrices is not None
    count = change.matrices(spec)
    each = len(rows) // count, columns
    return (count, *(each[::-1] if change.turned else each))


def changed(info: TensorInfo, table: Table, layers: Sequence[Any], error: Error) -> Iterator[tuple[str, Changed]]:
    """The tensors that one of a file becomes, by their GGUF names; none if the table does not change it. Of axes that there
    are too many, those of one element are left out. layers: of the configuration.

    Raises ModelFileError for a shape that does not fit the configuration, UnsupportedModelError for another dtype.
    """
    changes, layer = table.changes(info.name)
    if changes and layer is not None and layer >= len(layers):
        raise error(info.name, f"the model has only {len(layers)} layers")
    used: list[np.ndarray] = []
    for name, row, change in changes:
        require_plain(info)
        spec, shape = layers[layer or 0], list(info.shape)
        while len(shape) > len(row.axes) and 1 in shape:
            shape.remove(1)
        rows = np.arange(shape[0]) if change.rows is None else change.rows(spec)
        columns = None if change.columns is None else change.columns(spec)
        used.append(rows)
        if columns is not None and (len(shape) != 2 or len(columns) != shape[1]):
            raise error(info.name, f"shape {list(info.shape)}; expected {len(columns)} columns")
        if len(used) == len(changes) and not np.array_equal(np.sort(np.concatenate(used)), np.arange(shape[0])):
            raise error(info.name, f"shape {list(info.shape)}; expected {sum(map(len, used))} rows")
        new = (len(rows), *shape[1:]) if change.matrices is None else _by_matrix(rows, shape[1], change, spec)
        yield name, Changed(info, new, rows, columns, change.values, shape[0], change.turned)


@dataclasses.dataclass(frozen=True)
class Held(TensorInfo):
    """A tensor whose rows are in one with another name."""

    part: Changed | None = None

    @property
    def is_expanded(self) -> bool:
        """Whether it has another format than in the file."""
        return self.part is not None and self.part.format != self.part.info.format


def unjoined(
    tensors: Mapping[str, TensorInfo], table: Table, layers: Callable[[], Sequence[Any]], error: Error
) -> dict[str, TensorInfo]:
    """The tensors of a GGUF file where those that hold the rows of several are `Held` ones. layers(): of the configuration.

    Raises ModelFileError for a shape that does not fit the configuration, and for rows that are also in a separate tensor.
    """
    joined = {name: table.held(name) for name in tensors}
    specs = layers() if any(held for held, _ in joined.values()) else ()
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        held, layer = joined[name]
        if layer is None or layer >= len(specs) or not all(row.layers(specs[layer]) for _, row, _ in held):
            found[name] = info
            continue
        rows = [change.rows(specs[layer]) for _, _, change in held if change.rows]
        count, experts = math.prod(info.shape[:-1]), math.prod(info.shape[:-2])
        if count != sum(map(len, rows)) or len(rows[0]) % experts:
            raise error(name, f"shape {list(info.shape)}; expected {sum(map(len, rows))} rows in all")
        for (own, _, change), numbers in zip(held, rows, strict=True):
            if own in tensors:
                raise error(own, f"is there twice: also in {name}")
            shape: tuple[int, ...] = (*info.shape[:-2], len(numbers) // experts, info.shape[-1])
            if change.matrices is not None:
                shape = _by_matrix(numbers, info.shape[-1], change, specs[layer])
            part = Changed(info, shape, numbers, None, None, count, change.turned)
            found[own] = Held(name, part.format, shape, info.path, info.offset, part.nbytes, part=part)
    return found


def require_plain(info: TensorInfo) -> None:
    """UnsupportedModelError for a dtype that weights cannot have."""
    if info.format not in PLAIN:
        raise UnsupportedModelError(
            f"{info.path}: tensor {info.name}: dtype {info.format} is not supported; supported: {', '.join(PLAIN)}"
        )
