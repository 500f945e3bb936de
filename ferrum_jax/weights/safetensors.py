"""Parses and checks the header of one safetensors file without trusting a byte of it.

The idea: whatever could cost memory or time (the header's length, the number of its objects and commas) is compared with the
file and with limits far above any real model before parsing; then every tensor must fill exactly the bytes that its dtype and
shape require, and all tensors together the whole file.

Layout (https://github.com/huggingface/safetensors#format): uint64 length of the header; the header, a JSON object {name:
{"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}; the data, row-major, little-endian.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.json_file import parse_object
from ferrum_jax.files.tensor_info import TensorInfo

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 18
MAX_DIMENSIONS = 8
MAX_TENSOR_VALUES = 1 << 48
_COMMAS = 16  # a tensor's entry has three, and one for every two axes

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a git-LFS pointer in place of the model: run `git lfs pull`, or download the file"),
    (b"GGUF", "a GGUF file: name it, not the directory"),
    (b"PK\x03\x04", "a pickled PyTorch checkpoint under another name, which could run any program"),
    (b"\x80", "a pickled PyTorch checkpoint under another name, which could run any program"),
    (b"<", "a web page in place of the model: the download went to a login or error page"),
)


def parse_header(path: Path, fd: int, file_size: int, *, header_only: bool = False) -> dict[str, TensorInfo]:
    """The tensors of the open file `fd` by name; `format` is their dtype as the file spells it ("BF16"). Tensor data are not
    read, and with `header_only` need not be there.

    Raises ModelFileError for anything damaged.
    """

    def error(problem: str) -> ModelFileError:
        return ModelFileError(f"{path}: {problem}")

    head = os.pread(fd, 64, 0)
    if not head:
        raise error("the file is empty; download it again")
    length = int.from_bytes(head[:8], "little")
    if len(head) < 10 or length > MAX_HEADER_BYTES or head[8:9] != b"{":
        for start, meaning in _OTHER_FORMATS:
            if head.startswith(start):
                raise error(f"this is not a safetensors file: {meaning}")
        if length > MAX_HEADER_BYTES:
            raise error(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        raise error(f"this is not a safetensors file: {head[:16]!r} is not a length followed by a JSON object")
    if 8 + length > file_size:
        raise error(f"the header claims {length} bytes, but the file ends after {file_size}: it is truncated")
    raw = os.pread(fd, length, 8)
    if len(raw) < length:
        raise error(f"the file became shorter than {8 + length} bytes while its header was read")
    if raw.count(b"{") > MAX_TENSORS or raw.count(b",") > _COMMAS * MAX_TENSORS or raw.count(b"[") > 4 * MAX_TENSORS:
        raise error(f"the header has more entries than {MAX_TENSORS} tensors need")
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        raise error(f"the header is not valid UTF-8 at byte {8 + problem.start} of the file") from None
    entries = parse_object(text, str(path))
    _check_metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            kind = "overlap" if info.offset < end else "leave a gap"
            raise error(f"tensor {info.name!r} begins at byte {info.offset}, not at byte {end}: the tensors {kind}")
        end += info.nbytes
    if end > file_size and not header_only:
        raise error(f"the tensors end at byte {end}, but the file ends after {file_size}: it is truncated; download it again")
    if end < file_size:
        raise error(f"the tensors end at byte {end}, but the file has {file_size}: it is damaged")
    return tensors


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(f"{path}: key '__metadata__' must hold texts by name")


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def error(problem: str) -> ModelFileError:
        return ModelFileError(f"{path}: tensor {name!r} {problem}")

    if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise ModelFileError(f"{path}: the name {name.encode(errors='replace')!r} of a tensor is not text")
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error("must have the keys dtype, shape and data_offsets and no others")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise error(f"has the unknown dtype {dtype!r}; the dtypes are {', '.join(ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_TENSOR_VALUES:
        raise error(f"has the shape {shape!r:.200}; it must be at most {MAX_DIMENSIONS} counts, up to 2**48 values together")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"has the data_offsets {offsets!r:.200}; they must be [begin, end]")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise error(f"is {dtype} {shape}, which takes {nbytes} bytes, but its data_offsets {offsets} have another length")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
