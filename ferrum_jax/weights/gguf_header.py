"""Parses and checks the header of one GGUF file (versions 2 and 3, little-endian) without trusting a byte of it.

The idea: one cursor over one growing buffer. Every count and length is compared with the bytes that remain in the file, and
with fixed limits far above any real model, before anything of that size is read, allocated or looped over. So a damaged file
costs milliseconds, and no built-in exception has to be caught and translated.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count, entry count; the
metadata entries; the tensor records; padding up to `general.alignment`; the tensor data.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights import ggml_types

MAX_HEADER_BYTES = 64 << 20  # the largest vocabularies in use need about 20 MiB
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 21  # strings in all arrays of a file together
MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 255
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_TENSOR_VALUES = 1 << 48
DEFAULT_ALIGNMENT = 32
_FIRST_READ = 1 << 16

_STRING, _ARRAY, _BOOL = 8, 9, 7
_TYPE_NAMES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32"),
    *("float32", "bool", "string", "array", "uint64", "int64", "float64"),
)
_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_SCALARS = {
    type_id: struct.Struct("<" + code)
    for type_id, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True)
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_PREAMBLE = struct.Struct("<4sIQQ")

_OTHER_FORMATS = (
    (b"version https://git-lfs", "a git-LFS pointer in place of the model: run `git lfs pull`, or download the file"),
    (b"lmgg", "a GGML file from before GGUF: convert it, or download a GGUF version"),
    (b"tjgg", "a GGML file from before GGUF: convert it, or download a GGUF version"),
    (b"fmgg", "a GGML file from before GGUF: convert it, or download a GGUF version"),
    (b"FUGG", "a byte-swapped (big-endian) GGUF file: only little-endian files are supported"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint: a .gguf file is needed"),
)


@dataclass(frozen=True)
class Header:
    """The contents of a header: the metadata, their types ("uint32", "array string") and the tensors, in the order of the
    file."""

    metadata: dict[str, object]
    types: dict[str, str]
    tensors: dict[str, TensorInfo]


def parse_header(path: Path, fd: int, file_size: int, *, header_only: bool = False) -> Header:
    """Reads the header of the open file `fd` and checks all of it. Tensor data are not read, and with `header_only` need not be
    there.

    Raises ModelFileError for anything damaged, UnsupportedModelError for a known tensor type that weights cannot have.
    """
    cursor = _Cursor(path, fd, file_size)
    num_tensors, num_entries = _read_preamble(cursor)
    metadata: dict[str, object] = {}
    types: dict[str, str] = {}
    for index in range(num_entries):
        where = f"metadata entry {index + 1} of {num_entries}"
        key = cursor.text(f"the key of {where}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice; each key must be there once")
        start = cursor.position
        metadata[key] = _read_value(cursor, f"metadata key {key!r}")
        types[key] = _type_name(cursor.buffer, start)
    records = [_read_tensor_record(cursor, index, num_tensors) for index in range(num_tensors)]
    alignment = _alignment(cursor, metadata)
    return Header(metadata, types, _place_tensors(cursor, records, alignment, header_only))


class _Cursor:
    """A position in the header; `need` makes the bytes from there available, or raises an error that says why they are
    missing."""

    def __init__(self, path: Path, fd: int, file_size: int) -> None:
        self.path, self.fd, self.file_size = path, fd, file_size
        self.buffer = b""
        self.position = 0
        self.strings_left = MAX_STRINGS

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}")

    def need(self, count: int, what: str) -> None:
        end = self.position + count
        if end <= len(self.buffer):
            return
        if end > self.file_size:
            raise self.error(
                f"{what} needs {count} bytes at byte {self.position}, but the file ends after {self.file_size} bytes: "
                "it is truncated or damaged; download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.error(
                f"{what} needs {count} bytes at byte {self.position}, but a header may have at most "
                f"{MAX_HEADER_BYTES} bytes; the file is damaged"
            )
        # Growing fourfold keeps the copying below half the final size.
        target = min(max(end, 4 * len(self.buffer), _FIRST_READ), self.file_size, MAX_HEADER_BYTES)
        self.buffer += os.pread(self.fd, target - len(self.buffer), len(self.buffer))
        if len(self.buffer) < end:
            raise self.error(f"the file became shorter than {end} bytes while its header was read")

    def unpack(self, layout: struct.Struct, what: str) -> tuple:
        self.need(layout.size, what)
        values = layout.unpack_from(self.buffer, self.position)
        self.position += layout.size
        return values

    def text(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        (length,) = self.unpack(_U64, what)
        if length > max_bytes:
            raise self.error(f"{what} claims {length} bytes; at most {max_bytes} are allowed")
        self.need(length, what)
        start, self.position = self.position, self.position + length
        return self._decode(self.buffer[start : self.position], start, what)

    def texts(self, count: int, where: str) -> list[str]:
        """An array of strings. The loop is written out for speed, as vocabularies have hundreds of thousands of strings."""
        if count > self.strings_left:
            raise self.error(
                f"{where} claims {count} strings, with earlier ones more than the {MAX_STRINGS} that a file may have"
            )
        self.strings_left -= count
        spans: list[bytes] = []
        buffer, available, position = self.buffer, len(self.buffer), self.position
        length_at, append = _U64.unpack_from, spans.append
        for index in range(count):
            start = position + 8
            if start > available:
                self.position = position
                self.need(8, f"{where}, string {index}, its length")
                buffer, available = self.buffer, len(self.buffer)
            (length,) = length_at(buffer, position)
            position = start + length
            if position > available:
                self.position = start
                self.need(length, f"{where}, string {index}")
                buffer, available = self.buffer, len(self.buffer)
            append(buffer[start:position])
        self.position = position
        try:
            return list(map(bytes.decode, spans))
        except UnicodeDecodeError:
            return [self._decode(span, None, f"{where}, string {index}") for index, span in enumerate(spans)]

    def _decode(self, raw: bytes, start: int | None, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            at = "" if start is None else f" at byte {start + error.start} of the file"
            raise self.error(f"{what} is not valid UTF-8{at}: {raw[:60]!r}") from None


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.file_size == 0:
        raise cursor.error("the file is empty; download it again")
    head = os.pread(cursor.fd, 512, 0)
    if head[:4] != b"GGUF":
        raise cursor.error(f"this is not a GGUF file: {_what_else(head)}")
    if len(head) < _PREAMBLE.size:
        raise cursor.error(f"the file is truncated: it ends after {len(head)} bytes, inside the first header fields")
    _, version, num_tensors, num_entries = _PREAMBLE.unpack_from(head)
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF file; only little-endian files are supported: convert it")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}; only versions 2 and 3 are supported: convert or download it again")
    cursor.position = _PREAMBLE.size
    remaining = cursor.file_size - cursor.position
    for count, what, smallest, limit in (
        (num_entries, "metadata entries", 8 + 1 + 4 + 1, MAX_ENTRIES),
        (num_tensors, "tensors", 8 + 1 + 4 + 8 + 4 + 8, MAX_TENSORS),
    ):
        if count > limit:
            raise cursor.error(f"the header claims {count} {what}; at most {limit} are allowed")
        if count * smallest > remaining:
            raise cursor.error(f"the header claims {count} {what}, but only {remaining} bytes follow it")
    return num_tensors, num_entries


def _what_else(head: bytes) -> str:
    for start, meaning in _OTHER_FORMATS:
        if head.startswith(start):
            return meaning
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (HTML) in place of the model: the download went to a login or error page"
    if head[8:9] == b"{":
        return "it looks like a safetensors file: name the checkpoint's directory instead"
    return f"it begins with {head[:16]!r} where the magic b'GGUF' must stand"


def _read_value(cursor: _Cursor, where: str) -> object:
    (type_id,) = cursor.unpack(_U32, f"{where}, its type")
    if type_id == _STRING:
        return cursor.text(where)
    if type_id == _ARRAY:
        return _read_array(cursor, where)
    if type_id not in _SCALARS:
        raise cursor.error(f"{where} has the unknown value type {type_id}; the types are {_known_types()}")
    (value,) = cursor.unpack(_SCALARS[type_id], where)
    if type_id == _BOOL:
        if value > 1:
            raise cursor.error(f"{where} is a bool of value {value}; it must be 0 or 1")
        return value == 1
    return value


def _read_array(cursor: _Cursor, where: str) -> list[str] | np.ndarray:
    (type_id,) = cursor.unpack(_U32, f"{where}, the type of its elements")
    (count,) = cursor.unpack(_U64, f"{where}, the length of its array")
    if type_id == _ARRAY:
        raise cursor.error(f"{where} is an array of arrays; only arrays of numbers, bools or strings are supported")
    if type_id not in _DTYPES and type_id != _STRING:
        raise cursor.error(f"{where} is an array of the unknown value type {type_id}; the types are {_known_types()}")
    smallest = 8 if type_id == _STRING else np.dtype(_DTYPES[type_id]).itemsize
    remaining = cursor.file_size - cursor.position
    if count * smallest > remaining:
        raise cursor.error(
            f"{where} claims an array of {count} elements ({_TYPE_NAMES[type_id]}, at least {count * smallest} bytes), "
            f"but only {remaining} bytes remain in the file"
        )
    if type_id == _STRING:
        return cursor.texts(count, where)
    cursor.need(count * smallest, where)
    values = np.frombuffer(cursor.buffer, _DTYPES[type_id], count, cursor.position).copy()
    cursor.position += values.nbytes
    if type_id == _BOOL:
        if count and values.max() > 1:
            raise cursor.error(f"{where} is an array of bools with the value {values.max()}; each must be 0 or 1")
        return values.view(np.bool_)
    return values


def _type_name(buffer: bytes, start: int) -> str:
    """The type of the value at `start`, which has been read already: "uint32", "array string"."""
    name = _TYPE_NAMES[_U32.unpack_from(buffer, start)[0]]
    return name if name != "array" else f"array {_TYPE_NAMES[_U32.unpack_from(buffer, start + 4)[0]]}"


def _known_types() -> str:
    return ", ".join(f"{index} ({name})" for index, name in enumerate(_TYPE_NAMES))


@dataclass(frozen=True)
class _Record:
    """A tensor record as stored in the file: `offset` counts from the start of the tensor data."""

    name: str
    type: ggml_types.GGMLType
    dims: tuple[int, ...]  # fastest axis first, as in the file
    offset: int


def _read_tensor_record(cursor: _Cursor, index: int, num_tensors: int) -> _Record:
    name = cursor.text(f"the name of tensor {index + 1} of {num_tensors}", MAX_NAME_BYTES)
    if not name:
        raise cursor.error(f"tensor {index + 1} of {num_tensors} has an empty name")
    where = f"tensor {name!r}"
    (num_dims,) = cursor.unpack(_U32, f"{where}, the number of its dimensions")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise cursor.error(f"{where} claims {num_dims} dimensions; it must have 1 to {MAX_DIMENSIONS}")
    *dims, type_id, offset = cursor.unpack(struct.Struct(f"<{num_dims}QIQ"), f"{where}, its record")
    if 0 in dims:
        raise cursor.error(f"{where} has the dimensions {dims}; each must be at least 1")
    if math.prod(dims) > MAX_TENSOR_VALUES:
        raise cursor.error(f"{where} has the dimensions {dims}, more than 2**48 values together: they overflow")
    if type_id not in ggml_types.BY_ID:
        raise cursor.error(f"{where} has the unknown ggml type {type_id}")
    ggml_type = ggml_types.BY_ID[type_id]
    if not ggml_type.holds_weights:
        usable = ", ".join(t.name for t in ggml_types.TYPES if t.holds_weights)
        raise UnsupportedModelError(
            f"{cursor.path}: {where} has the unsupported tensor type {ggml_type.name}; a weight must be one of {usable}"
        )
    if dims[0] % ggml_type.block_size:
        raise cursor.error(
            f"{where} is {ggml_type.name} with rows of {dims[0]} values; a row must be a multiple of {ggml_type.block_size}"
        )
    return _Record(name, ggml_type, tuple(dims), offset)


def _alignment(cursor: _Cursor, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        found = value if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise cursor.error(f"metadata key 'general.alignment' is {found}; it must be a power of two from 8 to {MAX_ALIGNMENT}")
    return value


def _place_tensors(cursor: _Cursor, records: list[_Record], alignment: int, header_only: bool) -> dict[str, TensorInfo]:
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for record in records:
        where = f"tensor {record.name!r}"
        if record.name in tensors:
            raise cursor.error(f"{where} appears twice; each name must be there once")
        if record.offset % alignment:
            raise cursor.error(f"{where} lies at offset {record.offset}, not a multiple of the alignment {alignment}")
        nbytes = math.prod(record.dims) // record.type.block_size * record.type.block_bytes
        offset = data_start + record.offset
        if offset + nbytes > cursor.file_size and not header_only:
            raise cursor.error(
                f"{where} ({record.type.name}, {nbytes} bytes at byte {offset}) ends beyond the file's "
                f"{cursor.file_size} bytes: the file is truncated or damaged; download it again"
            )
        shape = record.dims[::-1]
        tensors[record.name] = TensorInfo(record.name, record.type.name, shape, cursor.path, offset, nbytes)
    by_offset = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise cursor.error(
                f"tensor {after.name!r} begins at byte {after.offset}, inside tensor {before.name!r} "
                f"(bytes {before.offset} to {before.offset + before.nbytes}): tensors must not overlap"
            )
        if before.offset + before.nbytes + alignment <= after.offset:
            raise cursor.error(
                f"tensor {before.name!r} ends at byte {before.offset + before.nbytes} and the next, {after.name!r}, begins "
                f"at byte {after.offset}: tensors follow each other without gaps, so its type or shape is wrong"
            )
    return tensors
