"""Converts a checkpoint to a directory (Orbax) or to a GGUF file, and optionally quantizes it.

The output appears under its name only when it is complete, and replaces nothing unless `force` is set. A GGUF file is written
tensor by tensor. A directory has the parameters in the layout of one device, so the model is loaded for that device first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import jax
import numpy as np

from ferrum_jax import hub
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.loading import check
from ferrum_jax.weights import ggml_types, orbax
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.adapter_gguf import write_adapter_file
from ferrum_jax.weights.fresh import fresh
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.quantize import PLAIN, checked_format, plain_numbers
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.stream import read_parameters

KINDS = ("orbax", "gguf")
Progress = Callable[[int, int | None, str], None]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    quantize: str | None = None,
    merge_adapter: str | Path | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
    device: jax.Device | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a model to `out`, and returns that path.

    Args:
      source: the model, as for `load`.
      out: the new directory or file.
      to: "orbax", a directory that `load` accepts, with the parameters in the layout of `device`; or "gguf", a file.
      quantize: as for `load`.
      merge_adapter: as for `load`.
      adapter: a LoRA adapter of the model, which is written in its place, as a GGUF file that llama.cpp takes with --lora.
      force: replace an existing `out`.
      device: None: JAX's first device.
      progress: as for `load`.

    Raises:
      FileExistsError: if `out` exists.
      ValueError: if an argument is wrong. The other errors are those of `load`.
    """
    if to not in KINDS:
        raise ValueError(f"to {to!r} is not supported; supported: {', '.join(KINDS)}")
    checked_format(quantize)
    if adapter is not None and (to != "gguf" or quantize is not None or merge_adapter is not None):
        raise ValueError("adapter: is written as a GGUF file, alone and in F32; without quantize and merge_adapter")
    out = Path(out)
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists")
    path = hub.resolve(str(source), progress=progress)
    with open_model(path, quantize=quantize, merge_adapter=merge_adapter) as checkpoint:
        if adapter is not None:
            config = check(checkpoint)[0]
            write_adapter_file(read_adapter(adapter, config, checkpoint).factors, config, out, str(adapter))
        elif to == "gguf":
            write_gguf(checkpoint, out, force=force, progress=progress)
        else:
            config, assigned, _ = check(checkpoint)
            params = read_parameters(checkpoint, assigned, Placement.of(device), progress)
            if progress is not None:
                progress(checkpoint.tensor_bytes, checkpoint.tensor_bytes, "writing")
            orbax.save(out, config, checkpoint.typed_metadata(), params, orbax.tokenizer_files(checkpoint), force=force)
    return out


# ---- GGUF


def write_gguf(source: ModelSource, out: Path, *, force: bool = False, progress: Progress | None = None) -> None:
    """Writes an open checkpoint as one GGUF file. Tensors and metadata of a GGUF file stay as they are; those of another
    checkpoint get the names and the order of llama.cpp's converter."""
    config, _, _ = check(source)
    metadata = _metadata(source, config)
    windows = {mixer.window for mixer in config.attentions} - {0}
    if windows and progress is not None and not source.family.windows_in_gguf:
        progress(0, None, f"llama.cpp does not apply the window of {max(windows)} tokens in this architecture")
    kept = {name: _kept(source, name, info) for name, info in source.tensors.items()}
    if out.is_dir():
        raise FileExistsError(f"{out} is a directory")
    total = sum(info.nbytes for info in kept.values())
    with fresh(out, total) as partial, contextlib.closing(gguf.GGUFWriter(partial, config.architecture)) as writer:
        add_metadata(writer, metadata)
        for name, info in kept.items():
            kind = gguf.GGMLQuantizationType(ggml_types.BY_NAME[info.format].type_id)
            writer.add_tensor_info(name, info.shape, np.dtype(np.float32), info.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for name, info in kept.items():
            writer.write_tensor_data(_bytes(source, config, name, info))
            done += info.nbytes
            if progress is not None:
                progress(done, total, "writing")
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        if out.exists() and not force:
            raise FileExistsError(f"{out} exists")
        partial.replace(out)


def _metadata(source: ModelSource, config: ModelConfig) -> dict[str, Typed]:
    metadata = source.typed_metadata()
    if f"{config.architecture}.block_count" not in metadata:
        metadata |= {"general.architecture": Typed(config.architecture, "string"), "general.type": Typed("model", "string")}
        assert source.family.to_gguf is not None  # encoders were refused before
        metadata |= source.family.to_gguf(config, str(source.path))
    if "tokenizer.ggml.tokens" not in metadata:
        metadata = {key: entry for key, entry in metadata.items() if not key.startswith("tokenizer.")}
        from ferrum_jax.tokenizer.to_gguf import tokenizer_metadata

        metadata |= tokenizer_metadata(source.tokenizer_directory, config.vocab_size, source.family.vocabulary)
    return metadata


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Typed]) -> None:
    """Gives a file these keys and no others."""
    writer.kv_data[0].clear()
    for key, (value, kind) in metadata.items():
        if kind.startswith("array "):
            items = value.tolist() if isinstance(value, np.ndarray) else value
            if not items:  # gguf-py cannot write it, and to llama.cpp a missing key means the same
                continue
            element = gguf.GGUFValueType[kind.partition(" ")[2].upper()]
            writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, element)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()])
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else None
    if isinstance(alignment, int):
        writer.data_alignment = alignment


def _kept(source: ModelSource, name: str, info: TensorInfo) -> TensorInfo:
    """The tensor as the file stores it: norms, biases and routers of other checkpoints become float32 in GGUF."""
    where = f"{info.path}: tensor {source.own_name(name)}"
    tensor, _ = source.family.tensors.find(name)
    assert tensor is not None  # `check` found it in the table
    if tensor.not_in_gguf:
        raise UnsupportedModelError(f"{where}: {tensor.not_in_gguf}")
    if info.order is not None:
        raise UnsupportedModelError(f"{where}: GGUF cannot represent reordered columns")
    if info.format not in ggml_types.BY_NAME:
        raise UnsupportedModelError(f"{where}: GGUF does not have the format {info.format}")
    if source.is_gguf or info.format not in PLAIN or (len(info.shape) > 1 and tensor.quantize):
        return info
    values = info.nbytes // PLAIN[info.format].itemsize
    return TensorInfo(info.name, "F32", info.shape, info.path, info.offset, 4 * values)


def _bytes(source: ModelSource, config: ModelConfig, name: str, kept: TensorInfo) -> np.ndarray:
    """The bytes of a tensor, uint8 [rows, bytes], with the rows in the order of GGUF files."""
    info = source.tensors[name]
    raw = source.read(info)
    if info.format != kept.format:
        raw = plain_numbers(raw.view(PLAIN[info.format]), info.format).view(np.uint8)
    tensor, layer = source.family.tensors.find(name)
    if tensor is not None and tensor.gguf_rows and layer is not None and not source.is_gguf:
        rows = raw.reshape(kept.shape[0], -1)
        raw = np.empty_like(rows)
        raw[tensor.gguf_rows(config.layers[layer], kept.shape[0])] = rows
    return raw
