"""LoRA adapters as GGUF files, as llama.cpp reads them with --lora.

The one idea: such a file has the names of the model's GGUF file. The tensor NAME of that becomes a pair, NAME.lora_a [rank, in]
and NAME.lora_b [out, rank], whose rows and columns are in the order of NAME's.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from ferrum_jax import families
from ferrum_jax.adapters import Factors
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.table import Path as TensorPath
from ferrum_jax.families.table import Tensor
from ferrum_jax.files import open_regular
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.fresh import fresh
from ferrum_jax.weights.gguf_header import Header, parse_header
from ferrum_jax.weights.opened import read_range
from ferrum_jax.weights.quantize import PLAIN, plain_numbers

_ALPHA = "adapter.lora.alpha"
_HARMLESS = {"adapter.type", "adapter.lora.task_name", _ALPHA}
_SUFFIXES = (".lora_a", ".lora_b")


def read_adapter_file(path: Path, config: ModelConfig) -> tuple[Factors, str]:
    """The factors of an adapter for a model of this configuration, the scale (alpha / rank) included in B, and a digest of
    everything that was read. Raises as `adapter.read_adapter`."""
    file, status = open_regular(path, ".gguf")
    with file:
        header = parse_header(path, file.fileno(), status.st_size)
        alpha = _alpha(path, header, config)
        digest = hashlib.blake2b(repr(alpha).encode(), digest_size=16)
        found: dict[tuple[int, TensorPath], list[np.ndarray | None]] = {}
        for name, info in sorted(header.tensors.items()):
            layer, tensor, factor = _place(path, name, info.shape, config)
            raw = np.empty(info.nbytes, np.uint8)
            read_range(file, info, raw, 0)
            values = _numbers(raw, info)
            if not np.isfinite(values).all():
                raise ModelFileError(f"{path}: tensor {name}: holds values that are not finite")
            digest.update(name.encode() + values.tobytes())
            if factor and tensor.gguf_rows:
                values = values[tensor.gguf_rows(config.layers[layer], len(values))]
            found.setdefault((layer, tensor.path), [None, None])[factor] = values
    factors = {}
    for (layer, parameter), (a, b) in found.items():
        row = families.of_architecture(config.architecture, str(path)).tensors.at(parameter)
        assert row is not None
        name = f"blk.{layer}.{row.name}"
        if a is None or b is None:
            raise ModelFileError(f"{path}: tensor {name}{_SUFFIXES[a is not None]}: is missing")
        if len(a) != b.shape[1]:
            raise ModelFileError(f"{path}: tensor {name}: lora_a has rank {len(a)}, lora_b {b.shape[1]}")
        with np.errstate(over="ignore"):
            b = b * np.float32(alpha / len(a) if alpha else 1.0)
        if not np.isfinite(b).all():
            raise ModelFileError(f"{path}: tensor {name}.lora_b: times alpha {alpha} / rank is beyond float32")
        factors[layer, parameter] = a, b
    if not factors:
        raise ModelFileError(f"{path}: has no tensor")
    return factors, digest.hexdigest()


def write_adapter_file(factors: Factors, config: ModelConfig, out: Path, where: str) -> None:
    """Writes an adapter for llama.cpp and `read_adapter_file`. where: names the adapter in errors. All pairs get the largest
    rank, because the one alpha of a file is divided by each."""
    table = families.of_architecture(config.architecture, where).tensors
    rank = max(a.shape[-2] for a, _ in factors.values())
    made: dict[str, np.ndarray] = {}
    for (layer, parameter), (a, b) in sorted(factors.items()):
        tensor = table.at(parameter)
        assert tensor is not None  # the reader of the adapter found it
        if not tensor.is_projection:
            raise UnsupportedModelError(f"{where}: blk.{layer}.{tensor.name}: llama.cpp has no adapters of several matrices")
        if tensor.gguf_rows:
            rows = np.empty_like(b)
            rows[tensor.gguf_rows(config.layers[layer], len(b))] = b
            b = rows
        more = (0, rank - len(a))
        for suffix, values in zip(_SUFFIXES, (np.pad(a, (more, (0, 0))), np.pad(b, ((0, 0), more))), strict=True):
            made[f"blk.{layer}.{tensor.name}{suffix}"] = values
    import gguf  # late: only files that are written need it

    total = sum(values.nbytes for values in made.values())
    with fresh(out, total) as partial, contextlib.closing(gguf.GGUFWriter(partial, config.architecture)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(_ALPHA, float(rank))
        for name, values in made.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)


def _alpha(path: Path, header: Header, config: ModelConfig) -> float:
    """The metadata, checked, and their one number: 0 for a scale of 1."""
    expected = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": config.architecture}
    for key, value in expected.items():
        if (stated := header.metadata.get(key)) != value:
            raise ModelFileError(f"{path}: key {key}: is {stated!r:.200}; an adapter for this model has {value!r}")
    if unknown := next((key for key in header.metadata if key.startswith("adapter.") and key not in _HARMLESS), None):
        raise UnsupportedModelError(f"{path}: key {unknown}: is not supported")
    alpha = header.metadata.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not abs(alpha) <= 2.0**64:
        raise ModelFileError(f"{path}: key {_ALPHA}: alpha must be a number of sane size, not {alpha!r:.200}")
    return alpha


def _place(path: Path, name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, Tensor, int]:
    """The layer and the tensor of the model that a name means, and 0 for A or 1 for B; the shape fits it."""
    family = families.of_architecture(config.architecture, str(path))
    own, suffix = (name[:-7], name[-7:]) if name.endswith(_SUFFIXES) else (name, "")
    tensor, layer = family.tensors.find(own)
    if not suffix or tensor is None or layer is None or not tensor.is_projection:
        raise UnsupportedModelError(
            f"{path}: tensor {name}: is not supported; LoRA is applied to the projections of attention, of gated delta nets "
            "and of dense feed-forward layers"
        )
    if layer >= config.num_layers or not tensor.layers(config.layers[layer]):
        count = config.num_layers
        problem = f"which has {count} layers" if layer >= count else f"whose layer {layer} does not have this projection"
        raise ModelFileError(f"{path}: tensor {name}: does not fit this model, {problem}")
    rows, columns = family.shape(tensor, config, layer)
    factor = _SUFFIXES.index(suffix)
    fits = shape[:1] == (rows,) if factor else shape[1:] == (columns,)
    if len(shape) != 2 or 0 in shape or not fits:
        expected = f"[{rows}, rank]" if factor else f"[rank, {columns}]"
        raise ModelFileError(f"{path}: tensor {name}: shape {list(shape)} does not fit this model: {expected}")
    return layer, tensor, factor


def _numbers(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """float32 of the tensor's shape."""
    if info.format in PLAIN:
        return plain_numbers(raw.view(PLAIN[info.format]).reshape(info.shape), info.format)
    from pallas_kernels.blocks import unpack

    return np.asarray(unpack(raw.reshape(info.shape[0], -1), info.format))
