"""Checkpoints of our own: a directory with a header in JSON and the compressed parameters as one Orbax checkpoint.

    ferrum_jax.json   version, configuration, tokenizer and chat template, and which array is which parameter
    tokenizer/        the tokenizer files of a Hugging Face directory, if the model had any
    parameters/       Orbax: an uncompressed zarr array for every plane of every stack, one file per layer

The planes are those of a memory layout, which the header names. Orbax writes them and can read them; this module reads them as
plain files of bytes, straight into their place, so that a directory loads as fast as a GGUF file and is a `ModelSource` too. A
directory gets its name when all of it is written: an interrupted save leaves NAME.partial-PID.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax import families
from ferrum_jax.config import ModelConfig, parts
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families import Family
from ferrum_jax.files.json_file import read_object
from ferrum_jax.files.metadata import Typed, from_json, plain, to_json
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.tokenizer.huggingface import EXTRA_TEMPLATES
from ferrum_jax.tokenizer.opening import tokenizer_of_directory, tokenizer_of_gguf
from ferrum_jax.weights.fresh import flush, fresh
from ferrum_jax.weights.opened import Opened, checked_range
from ferrum_jax.weights.source import MARKER, ModelSource
from pallas_kernels.blocks import FORMATS, GROUPS, format_of
from pallas_kernels.blocks.layouts import LAYOUTS
from pallas_kernels.blocks.ordered import SUFFIX
from pallas_kernels.blocks.unpacking import unpack_blocks

VERSION = 1
_ARRAYS, _TOKENIZER = "parameters", "tokenizer"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("config.json", "generation_config.json"),
)
_READ_BYTES = 16 << 20
_SPLIT_BYTES = 64 << 20  # larger arrays have one file per layer


# ---- writing


@dataclasses.dataclass(frozen=True)
class Stack:
    """The parameter `path` in all layers that have it in one format: planes [layers, *experts, *plane]; without the first axis
    if the parameter belongs to no layer (layers == ()). shape: of one layer's tensor, in weights. apart: whether the names of
    its arrays include the shape, because layers of another shape have the same format."""

    path: tuple[str, ...]
    format: str
    memory_layout: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    apart: bool = False

    def key(self, plane: int) -> str:
        ordered = "order" if self.memory_layout.endswith(SUFFIX) else "plain"
        shape = ["x".join(map(str, self.shape))] if self.apart else []
        return ".".join((*self.path, self.format, ordered, *shape, str(plane)))


def tokenizer_files(source: ModelSource) -> list[Path]:
    """The files that its tokenizer is read from; none if the metadata hold the tokenizer."""
    if "tokenizer.ggml.tokens" in source.metadata:
        return []
    directory = source.tokenizer_directory
    names = [*_TOKENIZER_FILES, *(f"{EXTRA_TEMPLATES}/{file.name}" for file in (directory / EXTRA_TEMPLATES).glob("*.jinja"))]
    return [directory / name for name in names if (directory / name).is_file()]


def save(
    path: Path,
    config: ModelConfig,
    metadata: Mapping[str, Typed],
    params: dict,
    tokenizer_files: Sequence[Path] = (),
    *,
    force: bool = False,
) -> None:
    """Writes a model as a new directory `path`, which gets its name when it is complete. FileExistsError if `path` exists,
    unless it is such a checkpoint and `force` is set."""
    import orbax.checkpoint as ocp  # takes a second

    path = path.absolute()
    if path.exists() and not (force and (path / MARKER).is_file()):
        raise FileExistsError(f"{path} exists" + (" and is not a checkpoint of ferrum_jax" if force else ""))
    stacks = dict(_stacks(params))
    arrays = {stack.key(i): plane for stack, planes in stacks.items() for i, plane in enumerate(planes)}
    split = {
        stack.key(i): ocp.SaveArgs(shard_axes=(0,) if stack.layers and plane.nbytes > _SPLIT_BYTES else ())
        for stack, planes in stacks.items()
        for i, plane in enumerate(planes)
    }
    header = {
        "version": VERSION,
        "config": dataclasses.asdict(config),
        "metadata": to_json(metadata),
        "parameters": [dataclasses.asdict(stack) for stack in stacks],
    }
    with fresh(path, sum(plane.nbytes for plane in arrays.values())) as partial:
        partial.mkdir()
        with _quiet(), ocp.PyTreeCheckpointer(use_ocdbt=False, use_compression=False) as checkpointer:
            checkpointer.save(partial / _ARRAYS, arrays, save_args=split)
        for file in tokenizer_files:
            extra = (EXTRA_TEMPLATES,) if file.parent.name == EXTRA_TEMPLATES else ()
            to = Path(partial, _TOKENIZER, *extra, file.name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        (partial / MARKER).write_text(json.dumps(header))
        flush(partial)  # the name must not reach the disk before the contents
        replaced = path.with_name(f"{partial.name}-replaced")
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's warnings about formats not in use; if it cannot write, raises an OSError instead of the logs and
    tracebacks of its threads."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else hook(args)
    try:
        yield
        sys.unraisablehook = hook  # kept after a failure: writes may still end and find their loop closed
    except ValueError as error:
        if code := _os_error_code(error):
            for logger in loggers:
                logger.addFilter(_is_not_of_a_write)  # stays: a failed task is logged when the last thread lets go of it
            raise OSError(code, os.strerror(code)) from None
        raise
    finally:
        gc.collect()  # failed tasks are logged when they are collected
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _os_error_code(error: object) -> int:
    """The errno in the message of a write that TensorStore could not do; 0 if there is none."""
    found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return int(found[1]) if found else 0


def _is_not_of_a_write(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _os_error_code(record.exc_info[1]))


def _stacks(params: dict) -> Iterator[tuple[Stack, tuple[Any, ...]]]:
    for name in sorted(params.keys() - {"layers"}):
        value = params[name]
        if isinstance(value, QuantizedTensor):
            yield Stack((name,), value.format, value.memory_layout, value.matrix, ()), value.planes
        else:
            yield Stack((name,), "F32", "ggml", value.shape, ()), (value,)
    for path, value in _leaves(params["layers"], ()):
        keys: set[str] = set()
        for kind, stack in value.stacks.items():
            layers = tuple(i for i, kept in enumerate(value.formats) if kept == kind)
            named = Stack(path, stack.format, stack.memory_layout, stack.shape[1:], layers)
            yield dataclasses.replace(named, apart=named.key(0) in keys), stack.planes
            keys.add(named.key(0))


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], LayerStack]]:
    if isinstance(node, LayerStack):
        yield path, node
        return
    for name in sorted(node):
        yield from _leaves(node[name], (*path, name))


# ---- reading


@dataclasses.dataclass(frozen=True)
class _Array:
    """A plane of a stack: little-endian, in files of `rows` items of the first axis each."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    def file(self, item: int) -> Path:
        zeros = ["0"] * (len(self.shape) - 1)
        return self.path / ".".join([str(item // self.rows), *zeros])

    @property
    def item_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class OrbaxCheckpoint(Opened):
    """An open directory, a `ModelSource`; made by `open_checkpoint`."""

    def __init__(self, path: Path) -> None:
        header = _header(path)
        self.path = path
        self._closed = False
        try:
            self._config = _config(header["config"])
            typed = from_json(header["metadata"])
            stacks = [_stack(fields) for fields in header["parameters"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelFileError(f"{path / MARKER}: is damaged ({type(error).__name__}: {error})") from None
        self._family = families.of_architecture(self._config.architecture, str(path / MARKER))
        self.metadata: Mapping[str, object] = plain(typed)
        self._typed = typed
        self.tensors: Mapping[str, TensorInfo] = {}
        self._places: dict[TensorInfo, tuple[Stack, int, tuple[_Array, ...]]] = {}
        parts: list[Path] = []
        for stack in stacks:
            arrays = self._arrays(stack)
            for place, (name, info) in enumerate(self._infos(stack, arrays)):
                if name in self.tensors:
                    raise ModelFileError(f"{path / MARKER}: tensor {name} is there twice")
                self.tensors[name] = info  # type: ignore[index]
                self._places[info] = stack, place, arrays
                if info.order is not None:
                    plain_stack = dataclasses.replace(stack, memory_layout="ggml")
                    self._places[info.order] = plain_stack, place, arrays[-1:]
            parts += [file for array in arrays for file in _files(array)]
        self.parts = tuple(parts)

    def _arrays(self, stack: Stack) -> tuple[_Array, ...]:
        """The planes of a stack, each checked against the shape and dtype that the stack's format and memory layout require."""
        where = f"{self.path / MARKER}: parameter {'/'.join(stack.path)}"
        if self.family.tensors.at(stack.path) is None:
            raise ModelFileError(f"{where}: is unknown")
        if not all(0 <= size < 2**40 for size in (*stack.shape, *stack.layers)) or not 1 <= len(stack.shape) <= 3:
            raise ModelFileError(f"{where}: shape {stack.shape} of layers {stack.layers} is impossible")
        if (stack.format not in FORMATS and stack.format not in GROUPS) or stack.memory_layout not in LAYOUTS:
            raise UnsupportedModelError(
                f"{where}: format {stack.format!r} in memory layout {stack.memory_layout!r} is not known"
            )
        *experts, rows, columns = (1, *stack.shape)[-max(2, len(stack.shape)) :]
        try:
            known = LAYOUTS[stack.memory_layout].plane_shapes(stack.format, rows, columns)
        except (ValueError, TypeError) as error:
            raise ModelFileError(f"{where}: {error}") from None
        axes = ((len(stack.layers),) if stack.layers else ()) + tuple(experts)
        shapes = [(*axes, *(plane.shape[1:] if len(stack.shape) == 1 else plane.shape)) for plane in known]
        return tuple(
            _open_array(self.path / _ARRAYS / stack.key(i), shape, np.dtype(plane.dtype))
            for i, (shape, plane) in enumerate(zip(shapes, known, strict=True))
        )

    def _infos(self, stack: Stack, arrays: tuple[_Array, ...]) -> Iterator[tuple[str, TensorInfo]]:
        nbytes = math.prod(stack.shape[:-1]) * format_of(stack.format).row_bytes(stack.shape[-1])
        tensor = self.family.tensors.at(stack.path)
        assert tensor is not None  # `_arrays` has checked it
        for place, layer in enumerate(stack.layers or (None,)):
            name = tensor.name if layer is None else f"blk.{layer}.{tensor.name}"
            item = place if stack.layers else 0

            def info(
                array: _Array,
                format: str,
                shape: tuple[int, ...],
                nbytes: int,
                order: TensorInfo | None = None,
                name: str = name,
                item: int = item,
            ) -> TensorInfo:
                return TensorInfo(name, format, shape, array.file(item), item % array.rows * array.item_bytes, nbytes, order)

            order = None
            if stack.memory_layout.endswith(SUFFIX):
                shape = (*stack.shape[:-2], stack.shape[-1])
                order = info(arrays[-1], "I32", shape, 4 * math.prod(shape))
            yield name, info(arrays[0], stack.format, stack.shape, nbytes, order)

    @property
    def tokenizer_directory(self) -> Path:
        return self.path / _TOKENIZER

    def typed_metadata(self) -> dict[str, Typed]:
        return dict(self._typed)

    @property
    def family(self) -> Family:
        return self._family

    def read_config(self) -> ModelConfig:
        return self._config

    def tokenizer(self) -> Tokenizer:
        if self.tokenizer_directory.is_dir():
            return tokenizer_of_directory(self.tokenizer_directory)
        return tokenizer_of_gguf(self.metadata, source=str(self.path / MARKER))

    def own_name(self, name: str) -> str:
        return name

    def packed(self, info: TensorInfo, memory_layout: str) -> tuple[np.ndarray, ...] | None:
        """As `ModelSource.packed`."""
        return self._planes(info) if self.memory_layout(info) == memory_layout else None

    def memory_layout(self, info: TensorInfo) -> str:
        """The memory layout in which a tensor's blocks are stored."""
        return self._places[info][0].memory_layout.removesuffix(SUFFIX)

    def _planes(self, info: TensorInfo) -> tuple[np.ndarray, ...]:
        """The planes of a tensor's blocks as stored, [*experts, *plane] each."""
        stack, place, arrays = self._places[info]
        read = []
        for array in arrays[:-1] if info.order else arrays:
            shape = array.shape[1:] if stack.layers else array.shape
            out = np.empty(shape, array.dtype)
            self._fill(array, place * out.nbytes, out.reshape(-1).view(np.uint8))
            read.append(out)
        return tuple(read)

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """As `ModelSource.read_into`: the blocks, repacked if they are stored in a device layout."""
        checked_range(info, out, start)
        stack, place, arrays = self._places[info]
        flat = out.reshape(-1)
        memory_layout = stack.memory_layout.removesuffix(SUFFIX)
        if memory_layout == "ggml":
            self._fill(arrays[0], place * info.nbytes + start, flat)
            return
        *experts, rows, columns = stack.shape
        planes = [plane.reshape(-1, *plane.shape[len(experts) :]) for plane in self._planes(info)]
        blocks = [
            unpack_blocks([plane[e] for plane in planes], stack.format, memory_layout, rows, columns)
            for e in range(math.prod(experts))
        ]
        flat[:] = np.stack(blocks).reshape(-1)[start : start + out.nbytes]

    def _fill(self, array: _Array, start: int, out: np.ndarray) -> None:
        """Reads the bytes [start, start + len(out)) of an array, across the borders of its files."""
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        size = array.rows * array.item_bytes
        done = 0
        while done < len(out):
            number, offset = divmod(start + done, size)
            part = out[done : done + min(len(out) - done, size - offset)]
            _read(array.file(number * array.rows), offset, part)
            done += len(part)

    def close(self) -> None:
        self._closed = True


def open_checkpoint(path: Path) -> OrbaxCheckpoint:
    """Opens a directory and checks everything but the weights' values. Raises ModelFileError for anything damaged, missing or
    unfinished, UnsupportedModelError for another version."""
    return OrbaxCheckpoint(path)


def _header(path: Path) -> dict[str, Any]:
    marker = path / MARKER
    header = read_object(marker)
    if header is None:
        raise ModelFileError(f"{marker}: is missing")
    version = header.get("version")
    if type(version) is not int:
        raise ModelFileError(f"{marker}: has no version: it is damaged")
    if version != VERSION:
        raise UnsupportedModelError(
            f"{marker}: is a checkpoint of version {version}; this ferrum_jax reads version {VERSION}: convert the model again"
        )
    return header


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration; TypeError or ValueError for an impossible value."""
    config = ModelConfig.from_fields(fields)
    for part in parts(config):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            kind = {"int": int, "str": str, "bool": bool, "float": float}.get(str(field.type))
            if kind is not None and not (type(value) is kind or (kind is float and type(value) is int)):
                raise TypeError(f"config: {field.name} is {value!r}")
            if kind in (int, float) and not 0 <= value < 2**40:
                raise ValueError(f"config: {field.name} is {value!r}")
    return config


def _stack(fields: Mapping[str, Any]) -> Stack:
    apart = fields.get("apart", False)
    numbers = tuple(fields["shape"]), tuple(fields["layers"])
    memory_layout = fields["memory_layout"] if "memory_layout" in fields else fields["layout"]  # its name in earlier files
    stack = Stack(tuple(fields["path"]), fields["format"], memory_layout, *numbers, apart)
    if {type(part) for part in (*stack.path, stack.format, stack.memory_layout)} != {str}:
        raise TypeError(f"parameter {stack.path} of format {stack.format!r} in memory layout {stack.memory_layout!r}")
    if not {type(size) for size in (*stack.shape, *stack.layers)} <= {int} or type(apart) is not bool:
        raise TypeError(f"shape {stack.shape} of layers {stack.layers}, apart {apart!r}")
    return stack


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> _Array:
    """Checks the description of an array and the sizes of its files."""
    facts = read_object(path / ".zarray")
    if facts is None:
        raise ModelFileError(f"{path}: is missing: the checkpoint is damaged")
    chunks = facts.get("chunks")
    rows = chunks[0] if isinstance(chunks, list) and chunks else None
    expected = {
        "zarr_format": 2, "order": "C", "filters": None, "compressor": None, "dtype": dtype.newbyteorder("<").str,
        "shape": list(shape), "chunks": [rows, *shape[1:]],
    }  # fmt: skip
    wrong = [key for key, value in expected.items() if facts.get(key) != value]
    if wrong or type(rows) is not int or rows < 1:
        raise ModelFileError(
            f"{path / '.zarray'}: {', '.join(wrong) or 'chunks'} is not what ferrum_jax wrote: the array was changed"
        )
    array = _Array(path, shape, dtype, rows)
    for file in _files(array):
        size = file.stat().st_size if file.is_file() else None
        if size != rows * array.item_bytes:
            problem = "is missing" if size is None else f"has {size} bytes, not {rows * array.item_bytes}"
            raise ModelFileError(f"{file}: {problem}: the checkpoint is damaged")
    return array


def _files(array: _Array) -> list[Path]:
    return [array.file(item) for item in range(0, array.shape[0], array.rows)]


def _read(file: Path, offset: int, out: np.ndarray) -> None:
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be opened: {error.strerror}") from None
    try:
        view, done = out.data, 0
        while done < len(view):
            got = os.preadv(fd, [view[done : done + _READ_BYTES]], offset + done)
            if got == 0:
                raise ModelFileError(f"{file}: ends after {offset + done} bytes: it changed after it was opened")
            done += got
    finally:
        os.close(fd)
