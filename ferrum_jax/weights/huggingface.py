"""A Hugging Face checkpoint directory (config.json, one or more safetensors files) as a `ModelSource`.

The idea: when the directory is opened, every tensor of the family's table becomes a list of parts, each either bytes of a file
or a packed matrix; reading goes from the files straight into the caller's array. So the experts of a layer are stacked by being
read one after the other, and nothing is in memory twice.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_jax import families
from ferrum_jax.config import EncoderConfig, ModelConfig
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.files.json_file import open_regular, read_object
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.tokenizer.huggingface import chat_templates
from ferrum_jax.weights.changed import Changed, changed, require_plain
from ferrum_jax.weights.fused import Cut, Slice, fused
from ferrum_jax.weights.opened import Opened, checked_range, read_range
from ferrum_jax.weights.packed import SUFFIXES, PackedMatrix, agreeing, packed_matrix
from ferrum_jax.weights.safetensors import parse_header
from ferrum_jax.weights.schemes import Scheme, scheme_of

if TYPE_CHECKING:
    from ferrum_jax.tokenizer import Tokenizer

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Stored = Slice | Cut | Changed | PackedMatrix


@dataclasses.dataclass(frozen=True)
class Laid(TensorInfo):
    """A tensor and the parts that its bytes consist of, in order. For an order of columns, `parts` are the matrices that it is
    of."""

    parts: tuple[Stored, ...] = ()


class HuggingFaceDirectory(Opened):
    """An open checkpoint directory, a `ModelSource`; made by `open_directory`."""

    def __init__(self, path: Path, config: ConfigFile, files: Mapping[Path, io.FileIO], header_only: bool) -> None:
        self.path, self.parts = path, tuple(files)
        self._config, self._files, self._header_only = config, files, header_only
        self.tensors: dict[str, TensorInfo] = {}
        self.passed_over: dict[str, TensorInfo] = {}
        self.metadata: dict[str, object] = {
            "general.architecture": config.config.architecture,
            "general.name": path.resolve().name,
        }
        if (path / "tokenizer.json").is_file():
            self.metadata["tokenizer.ggml.model"] = "tokenizer.json"
        for name, template in chat_templates(path).items():
            self.metadata["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = template

    @property
    def family(self) -> Family:
        """The family of the class that config.json names."""
        return self._config.family

    def read_config(self) -> ModelConfig | EncoderConfig:
        """The configuration, as config.json said when the directory was opened."""
        return self._config.config

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json."""
        from ferrum_jax.tokenizer.opening import tokenizer_of_directory

        return tokenizer_of_directory(self.path)

    def own_name(self, name: str) -> str:
        """The checkpoint's own name for the tensor `name`, with `*` for the number of an expert."""
        return self.family.tensors.own_name(name)

    def read_into(self, info: TensorInfo, out: np.ndarray, start: int = 0) -> None:
        """Fills the contiguous uint8 array `out` with the bytes [start, start + out.nbytes) of the tensor."""
        checked_range(info, out, start)
        if not isinstance(info, Laid):
            raise ValueError(f"tensor {info.name!r} is not of this checkpoint")
        flat, begin, stop = out.reshape(-1), 0, start + out.nbytes
        for part in info.parts:
            nbytes = 4 * part.shape[1] if info.format == "I32" else part.nbytes
            first, last = max(start, begin), min(stop, begin + nbytes)
            if first < last:
                self._read_part(info, part, flat[first - start : last - start], first - begin)
            begin += nbytes
        if info.format == "F32" and not info.parts:  # the factors of rotary frequencies, which config.json states
            assert self._config.rope_factors is not None
            flat[...] = self._config.rope_factors.view(np.uint8)[start:stop]

    def _read_part(self, info: TensorInfo, part: Stored, out: np.ndarray, start: int) -> None:
        if isinstance(part, Slice):  # straight into its place
            read_range(self._file(part.info), part.info, out, part.start + start)
        elif isinstance(part, PackedMatrix) and info.format == "I32":
            out[...] = part.order(self._raw).view(np.uint8)[start : start + out.nbytes]
        else:
            part.read_range(self._raw, out, start)

    def _file(self, info: TensorInfo) -> io.FileIO:
        if self._header_only:
            raise ModelFileError(f"{info.path}: only the header is here, not tensor {info.name!r}")
        return self._files[info.path]

    def _raw(self, info: TensorInfo, start: int = 0, nbytes: int | None = None) -> np.ndarray:
        out = np.empty(info.nbytes if nbytes is None else nbytes, np.uint8)
        read_range(self._file(info), info, out, start)
        return out


def open_directory(path: Path, *, header_only: bool = False) -> HuggingFaceDirectory:
    """Opens a checkpoint directory and checks everything but the tensor data (the scales, zero points and column orders of
    packed matrices are read, because the block formats depend on them).

    header_only: also accept files that end after their headers; reading a tensor raises ModelFileError.

    Raises ModelFileError for anything damaged, missing or inconsistent, UnsupportedModelError for a model class, a feature, a
    dtype or a quantization that is not supported, and for pickled weights.
    """
    content = read_object(path / "config.json")
    if content is None:
        raise UnsupportedModelError(
            f"{path}: is a directory without a config.json; a checkpoint directory or a path to a .gguf file is needed"
        )
    config = families.of_content(content, path / "config.json").read_json(content, path / "config.json")
    scheme = _scheme(path, config)
    with ExitStack() as stack:
        files: dict[Path, io.FileIO] = {}
        raw: dict[str, TensorInfo] = {}
        for name, expected in _weight_files(path).items():
            file = path / name
            try:
                opened, status = open_regular(file, ".safetensors")
            except FileNotFoundError:
                raise ModelFileError(f"{file}: this part of the checkpoint is missing; download it again") from None
            files[file] = stack.enter_context(opened)
            found = parse_header(file, opened.fileno(), status.st_size, header_only=header_only)
            _merge(raw, found, expected, file)
        directory = HuggingFaceDirectory(path, config, files, header_only)
        _Layout(directory, config, scheme, raw).lay_out()
        stack.pop_all()
    return directory


def _weight_files(path: Path) -> dict[str, set[str] | None]:
    """The files with weights, and for each the tensors that the index lists (None: there is no index)."""
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if _INDEX in indices or len(indices) == 1:
        return _read_index(path / (_INDEX if _INDEX in indices else indices[0]))
    weights = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")]
    if "model.safetensors" in weights or len(weights) == 1:
        return {"model.safetensors" if "model.safetensors" in weights else weights[0]: None}
    if weights:
        raise ModelFileError(f"{path / _INDEX}: is missing, and there are {len(weights)} .safetensors files")
    if pickled := [name for name in names if name.endswith(_PICKLED) or name.endswith(".bin.index.json")]:
        raise UnsupportedModelError(
            f"{path / pickled[0]}: is pickled, which is unsafe: unpickling a file can run any program; only .safetensors "
            "are read: convert the checkpoint where you trust it"
        )
    raise ModelFileError(f"{path}: has no .safetensors file")


def _read_index(path: Path) -> dict[str, set[str] | None]:
    content = read_object(path) or {}
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelFileError(f"{path}: key weight_map: must say which file each tensor is in")
    files: dict[str, set[str] | None] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ModelFileError(f"{path}: key weight_map: tensor {tensor}: {name!r} is not a file of this directory")
        if name.endswith(_PICKLED):
            raise UnsupportedModelError(f"{path}: key weight_map: {name} is pickled, which is unsafe; .safetensors are read")
        named = files.setdefault(name, set())
        assert named is not None
        named.add(tensor)
    return files


def _merge(raw: dict[str, TensorInfo], found: dict[str, TensorInfo], expected: set[str] | None, file: Path) -> None:
    if expected is not None and (missing := sorted(expected - found.keys())):
        raise ModelFileError(f"{file}: tensor {missing[0]}: is missing; the index says that it is in this file")
    for name, info in found.items():
        if name in raw:
            raise ModelFileError(f"{file}: tensor {name}: is also in {raw[name].path.name}")
        raw[name] = info


def _scheme(path: Path, config: ConfigFile) -> Scheme | None:
    """How matrices are packed, according to config.json or to the quantizer's own file."""
    if config.quantization is not None:
        return scheme_of(config.quantization, f"{path / 'config.json'}: key quantization_config")
    for name in ("quantize_config.json", "quant_config.json"):
        if (content := read_object(path / name)) is not None:
            return scheme_of(content, str(path / name))
    return None


class _Layout:
    """Maps tensors of the files to tensors of the family's table."""

    def __init__(self, directory: HuggingFaceDirectory, config: ConfigFile, scheme: Scheme | None, raw: dict[str, TensorInfo]):
        self.directory, self.config, self.scheme, self.raw = directory, config, scheme, raw
        self.table = directory.family.tensors

    def lay_out(self) -> None:
        """Fills `directory.tensors`. A tensor of the files that is neither used nor known to be unneeded is an error."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.raw.items():
            if re.fullmatch(self.table.passed_over, name) or self._predicts(name):
                self.directory.passed_over[name] = info
                continue
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = info
        stacks: dict[str, dict[int, Stored]] = {}
        for module, tensors in modules.items():
            for name, number, part in self._parts(module, tensors):
                if number in (parts := stacks.setdefault(name, {})):
                    raise self._error(part.name, f"is there twice: also as {parts[number].name}")
                parts[number] = part
        for name, parts in stacks.items():
            if -1 in parts:
                self._add(name, [parts[number] for number in sorted(parts)])
            else:
                self._add(name, self._experts(name, parts), (len(parts),))
        if self.config.rope_factors is not None:
            size = self.config.rope_factors.size
            path = self.directory.path / "config.json"
            self.directory.tensors["rope_freqs.weight"] = Laid("rope_freqs", "F32", (size,), path, 0, 4 * size)
        self._check_biases()
        self._check_optional()
        self._tie()

    def _predicts(self, name: str) -> bool:
        """Whether a tensor belongs to a block after the layers."""
        layer, layers = self.table.layer_of(name), self.config.config.num_layers
        return layer is not None and layers <= layer < layers + self.config.predicting

    def _tie(self) -> None:
        """If config.json ties output and embedding, a single matrix serves as both; if both are there, `tied.py` compares
        them."""
        tensors = self.directory.tensors
        if not self.config.tied:
            if "output.weight" not in tensors:
                raise self._error("lm_head.weight", "is missing, and config.json does not tie it to the embedding")
        elif "output.weight" in tensors and "token_embd.weight" not in tensors:
            tensors["token_embd.weight"] = tensors.pop("output.weight")
        elif self.directory._header_only:  # they cannot be compared, so config.json decides
            tensors.pop("output.weight", None)

    def _error(self, name: str, problem: str) -> ModelFileError:
        path = self.raw[name].path if name in self.raw else self.directory.path
        return ModelFileError(f"{path}: tensor {name}: {problem}")

    def _parts(self, module: str, tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, int, Stored]]:
        """(name in the table, number of the expert or -1, part) for the tensors of one module."""
        mxfp4 = self.scheme is not None and self.scheme.method == "mxfp4"
        if parts := self.table.parts(module):
            yield from fused(parts, tensors, mxfp4, self.config.family.model_class, self._error)
            return
        stem, number = self.table.locate(module)
        for info in tensors.values():
            for name, part in changed(info, self.table, self.config.config.layers, self._error):
                yield name, -1, part
        tensors = {suffix: info for suffix, info in tensors.items() if not self.table.changes(info.name)[0]}
        packed = {suffix: info for suffix, info in tensors.items() if suffix in SUFFIXES}
        for suffix, info in tensors.items():
            if suffix in packed or re.fullmatch(self.table.ignored, info.name):
                self._check_positions(info)
                continue
            if not stem or suffix not in ("weight", "bias") or (suffix == "weight" and packed):
                raise self._error(info.name, f"is unknown in a {self.config.family.model_class}")
            if suffix == "bias" and self._is_no_bias(stem, number, info, bool(packed)):
                continue
            require_plain(info)
            yield f"{stem}.{suffix}", number, Slice(info, info.shape, 0, info.nbytes)
        if packed:
            first = next(iter(packed.values()))
            if self.table.changes(f"{module}.weight")[0]:
                raise UnsupportedModelError(
                    f"{first.path}: tensor {first.name}: is packed, but this matrix is supported in F32, F16 and BF16 alone, "
                    "because its rows or columns get another order"
                )
            if self.scheme is None or mxfp4:
                raise self._error(first.name, "is packed, but neither config.json nor quantize_config.json says how")
            if not stem:
                raise self._error(first.name, f"is unknown in a {self.config.family.model_class}")
            read = None if self.directory._header_only else self.directory._raw
            yield f"{stem}.weight", number, packed_matrix(module, packed, self.scheme, read)

    def _check_positions(self, info: TensorInfo) -> None:
        """The buffer `position_ids` is skipped, but must be 0, 1, 2, ... (A buffer of rotary frequencies may differ from
        config.json, as transformers ignores it.)"""
        if info.name.endswith(".position_ids") and not self.directory._header_only:
            kind = {"I64": "<i8", "I32": "<i4"}.get(info.format)
            if kind is None or (self.directory._raw(info).view(kind) != np.arange(math.prod(info.shape))).any():
                raise self._error(info.name, "is not 0, 1, 2, ...: other positions are not supported")

    def _is_no_bias(self, stem: str, number: int, info: TensorInfo, packed: bool) -> bool:
        """Whether this is a bias of zeros that a quantizer added to a matrix without one."""
        if not packed or (number == -1 and stem.rpartition(".")[2] in self.config.biases):
            return False
        if not self.directory._header_only and self.directory._raw(info).any():
            raise self._error(info.name, f"is unknown in a {self.config.family.model_class} of this configuration")
        return True

    def _experts(self, name: str, parts: dict[int, Stored]) -> list[Stored]:
        """The parts of experts 0, 1, ...; all must be there, with one shape and one dtype."""
        count = self.config.config.num_experts
        own = self.directory.own_name(name)
        for number in range(max(count, max(parts) + 1)):
            if number not in parts:
                raise self._error(own.replace("*", str(number)), "is missing")
            if number >= count:
                raise self._error(parts[number].name, f"the model has only {count} experts")
        found = [parts[number] for number in range(count)]
        if all(isinstance(part, PackedMatrix) for part in found):
            found = list(agreeing([part for part in found if isinstance(part, PackedMatrix)]))
        first = found[0]
        for part in found:
            if (part.format, part.shape) != (first.format, first.shape):
                raise self._error(
                    part.name,
                    f"is {part.format} {list(part.shape)}, but {first.name} is {first.format} {list(first.shape)}: "
                    "the experts of a layer must have one dtype and shape",
                )
        return found

    def _add(self, name: str, parts: Sequence[Stored], lead: tuple[int, ...] = ()) -> None:
        first = parts[0]
        at = first.codes if isinstance(first, PackedMatrix) else first.info
        kind: dict[str, Any] = {"path": at.path, "offset": at.offset, "parts": tuple(parts)}
        order = None
        if isinstance(first, PackedMatrix) and first.ordered:
            columns = first.shape[1]
            order = Laid(first.name, "I32", (*lead, columns), nbytes=4 * columns * len(parts), **kind)
        nbytes = sum(part.nbytes for part in parts)
        self.directory.tensors[name] = Laid(at.name, first.format, (*lead, *first.shape), nbytes=nbytes, order=order, **kind)

    def _check_biases(self) -> None:
        """Raises an error unless biases are present exactly where config.json says so."""
        tensors = self.directory.tensors
        for number in range(self.config.config.num_layers):
            for kind in sorted(self.table.biased()):
                name = f"blk.{number}.{kind}.bias"
                expected = kind in self.config.biases and f"blk.{number}.{kind}.weight" in tensors
                if expected and name not in tensors:
                    raise self._error(self.directory.own_name(name), "is missing, but config.json requires it")
                if name in tensors and kind in self.config.biases and not expected:
                    raise self._error(self.directory.own_name(f"blk.{number}.{kind}.weight"), "is missing")
                if name in tensors and not expected:
                    raise self._error(tensors[name].name, "is not expected according to config.json")

    def _check_optional(self) -> None:
        """Raises an error unless tensors that not every model has are present exactly where config.json says so."""
        tensors, rows = self.directory.tensors, [row for row in self.table.layer if row.name in self.config.optional]
        for number, spec in enumerate(self.config.config.layers):
            for row in (row for row in rows if row.layers(spec)):
                name, expected = f"blk.{number}.{row.name}", self.config.optional[row.name]
                if expected and name not in tensors:
                    raise self._error(self.directory.own_name(name), "is missing, but config.json requires it")
                if name in tensors and not expected:
                    raise self._error(tensors[name].name, "is not expected according to config.json")
