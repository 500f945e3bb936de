"""GGUF files, including split ones: their contents and their bytes.

Opening reads and checks the headers only (`gguf_header`); tensor data are read on demand, by positioned reads straight into the
caller's array, so nothing is mapped and nothing is in memory twice. A model split into `name-00001-of-0000N.gguf` and so on
opens as one file, whichever of its parts is named. Needs NumPy, but not JAX.
"""

from __future__ import annotations

import io
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ferrum_jax import families
from ferrum_jax.errors import ModelFileError, ModelNotFoundError
from ferrum_jax.families import Family
from ferrum_jax.files import open_regular
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.changed import Held, unjoined
from ferrum_jax.weights.gguf_header import Header, parse_header
from ferrum_jax.weights.opened import Opened, checked_range, read_range

if TYPE_CHECKING:
    from ferrum_jax.config import EncoderConfig, ModelConfig
    from ferrum_jax.tokenizer import Tokenizer

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFFile(Opened):
    """An open model file, a `ModelSource`: `metadata` and `tensors` by name, over all parts; made by `open_gguf`.

    `metadata` values are int, float, bool, str, list[str], or a 1-D numpy array for arrays of numbers or bools; they come from
    the first part, and `types` gives the type of each in the file ("uint32", "array string"). `path` is the first part, `parts`
    are all of them in order.
    """

    is_gguf, checks_scales = True, False
    tensors: dict[str, TensorInfo]

    def __init__(
        self,
        parts: tuple[Path, ...],
        metadata: dict[str, object],
        tensors: dict[str, TensorInfo],
        files: dict[Path, io.FileIO],
        types: dict[str, str] | None = None,
    ) -> None:
        self.path = parts[0]
        self.parts = parts
        self.metadata = metadata
        self.types = types or {}
        self.tensors = tensors
        self._files = files

    @property
    def family(self) -> Family:
        """The family named by `general.architecture`."""
        return families.of_metadata(self.metadata, str(self.path))

    def typed_metadata(self) -> dict[str, Typed]:
        """The metadata with their types, without the keys of a split file. If tensors of an older file are other ones now, the
        keys that describe them are those of newer files."""
        typed = {key: Typed(value, self.types[key]) for key, value in self.metadata.items() if not key.startswith("split.")}
        parts = (info.part for info in self.tensors.values() if isinstance(info, Held))
        if self.family.to_gguf is not None and any(part is not None and part.turned for part in parts):
            typed |= self.family.to_gguf(self.config(), str(self.path))
        return typed

    def read_config(self) -> ModelConfig | EncoderConfig:
        """The configuration, read anew from metadata and shapes."""
        return self.family.read_gguf(self.metadata, self.tensors, str(self.path))

    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer."""
        from ferrum_jax.tokenizer.opening import tokenizer_of_gguf

        return tokenizer_of_gguf(self.metadata, source=str(self.path))

    def own_name(self, name: str) -> str:
        """The name itself, as names are GGUF's."""
        return name

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """Fills the contiguous uint8 array `out` with the bytes [start, start + out.nbytes) of the tensor.

        Raises ModelFileError if the file has become shorter or is only a header, ValueError for an unsuitable array or range or
        a closed file.
        """
        checked_range(info, out, start)
        if info.path not in self._files:
            raise ModelFileError(f"{info.path}: only the header is here, not tensor {info.name!r}")
        if isinstance(info, Held) and info.part is not None:
            info.part.read_range(self._raw, out, start)
        else:
            read_range(self._files[info.path], info, out, start)

    def _raw(self, info: TensorInfo, start: int, nbytes: int) -> np.ndarray:
        out = np.empty(nbytes, np.uint8)
        read_range(self._files[info.path], info, out, start)
        return out


def open_gguf(path: str | Path, *, header_only: bool = False) -> GGUFFile:
    """Opens a GGUF file, or all parts of a split one, and checks everything but the tensor data.

    header_only: also accept files that end after their headers; reading a tensor of one raises ModelFileError.

    Raises ModelNotFoundError if `path` does not exist, ModelFileError for anything damaged, missing or inconsistent,
    UnsupportedModelError for a tensor type that weights cannot have.
    """
    named = Path(path)
    with ExitStack() as stack:
        try:
            first = _open_part(named, stack, header_only)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{named}: no such file") from None
        parts = _open_siblings(first, stack, header_only)
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.header.tensors.items():
                if name in tensors:
                    raise ModelFileError(f"{part.path}: tensor {name!r} is also in {tensors[name].path.name}")
                tensors[name] = info
        for part in parts:
            count = _split_value(part, "split.tensors.count", default=len(tensors) if len(parts) == 1 else None)
            if count != len(tensors):
                raise ModelFileError(
                    f"{part.path}: metadata key 'split.tensors.count' is {count}, but the {len(parts)} parts hold "
                    f"{len(tensors)} tensors"
                )
        files = {part.path: part.file for part in parts}
        metadata, tensors, passed_over = _without_predictions(parts[0].header.metadata, tensors)
        model = GGUFFile(tuple(files), metadata, tensors, files, parts[0].header.types)
        model.passed_over = passed_over
        if families.sharing(metadata.get("general.architecture")) and not model.family.embeds:

            def error(name: str, problem: str) -> ModelFileError:
                return ModelFileError(f"{tensors[name].path}: tensor {name}: {problem}")

            model.tensors = unjoined(tensors, model.family.tensors, lambda: model.config().layers, error)
        stack.pop_all()
        return model


def _without_predictions(
    metadata: dict[str, object], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, object], dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Metadata and tensors as if the file had no blocks that predict further tokens, which come after the layers, and the
    tensors of these."""
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture}."
    key, count = f"{prefix}nextn_predict_layers", f"{prefix}block_count"
    extra, blocks = metadata.get(key), metadata.get(count)
    predicts = isinstance(architecture, str) and any(family.predicts for family in families.sharing(architecture))
    if not predicts or type(extra) is not int or type(blocks) is not int or not 0 < extra < blocks:
        return metadata, tensors, {}  # the reader of the configuration reports what is wrong with it
    layers = blocks - extra

    def cut(name: str, value: object) -> object:
        return value[:layers] if name.startswith(prefix) and isinstance(value, np.ndarray) and len(value) == blocks else value

    kept = {name: cut(name, value) for name, value in metadata.items() if name != key} | {count: layers}
    names = tuple(f"blk.{number}." for number in range(layers, blocks))
    passed_over = {name: info for name, info in tensors.items() if name.startswith(names)}
    return kept, {name: info for name, info in tensors.items() if name not in passed_over}, passed_over


@dataclass(frozen=True)
class _Part:
    path: Path
    file: io.FileIO
    inode: tuple[int, int]
    header: Header


def _open_part(path: Path, stack: ExitStack, header_only: bool) -> _Part:
    """Opens and parses one file. FileNotFoundError passes through, as the caller can say what the file was needed for."""
    file, status = open_regular(path, ".gguf")
    stack.enter_context(file)
    header = parse_header(path, file.fileno(), status.st_size, header_only=header_only)
    return _Part(path, file, (status.st_dev, status.st_ino), header)


def _open_siblings(named: _Part, stack: ExitStack, header_only: bool) -> list[_Part]:
    """All parts of the model that `named` is one of, in order."""
    match = _PART_NAME.fullmatch(named.path.name)
    number, name_count = (int(match["number"]), int(match["count"])) if match else (1, 1)
    count = _split_value(named, "split.count", default=0 if name_count == 1 else None)
    if count <= 1 and name_count == 1:
        if _split_value(named, "split.no", default=0) != 0:
            raise ModelFileError(f"{named.path}: metadata key 'split.no' is not 0, though the file is not split")
        return [named]
    if match is None or name_count != count or number > count:
        raise ModelFileError(
            f"{named.path}: metadata key 'split.count' is {count}: the file is one part of several and must be named "
            f"NAME-00001-of-{count:05d}.gguf and so on, with the other parts in the same folder"
        )
    parts: list[_Part] = []
    inodes: dict[tuple[int, int], Path] = {}
    for index in range(count):
        path = named.path.with_name(f"{match['stem']}-{index + 1:05d}-of-{count:05d}.gguf")
        try:
            part = named if index + 1 == number else _open_part(path, stack, header_only)
        except FileNotFoundError:
            raise ModelFileError(
                f"{path}: part {index + 1} of {count} is missing; all parts must lie in one directory"
            ) from None
        if part.inode in inodes:
            raise ModelFileError(f"{path}: this is the same file as {inodes[part.inode].name}: the split is cyclic")
        inodes[part.inode] = path
        for key, expected in (("split.no", index), ("split.count", count)):
            value = _split_value(part, key)
            if value != expected:
                raise ModelFileError(
                    f"{path}: metadata key {key!r} is {value}, but by its name it must be {expected}: "
                    "parts were renamed, repeated or mixed from different models"
                )
        parts.append(part)
    return parts


def _split_value(part: _Part, key: str, default: int | None = None) -> int:
    value = part.header.metadata.get(key, default)
    if type(value) is not int:
        problem = "is missing" if value is None else f"is a {type(value).__name__}, not an integer"
        raise ModelFileError(f"{part.path}: metadata key {key!r} {problem}; every part of a split model needs it")
    return value
