"""Opens a checkpoint of any kind by its path."""

from __future__ import annotations

from pathlib import Path

from ferrum_jax import families
from ferrum_jax.errors import ModelFileError
from ferrum_jax.weights.gguf import GGUFFile, open_gguf
from ferrum_jax.weights.huggingface import HuggingFaceDirectory, open_directory
from ferrum_jax.weights.quantize import Quantized, checked_format
from ferrum_jax.weights.source import MARKER, ModelSource
from ferrum_jax.weights.tied import tie


def open_model(
    path: str | Path, *, header_only: bool = False, quantize: str | None = None, merge_adapter: str | Path | None = None
) -> ModelSource:
    """Opens a .gguf file (any part of a split one) or a checkpoint directory and checks everything but tensor data.

    header_only: also accept files that end after their headers; reading a tensor of one raises ModelFileError. quantize: one of
    QUANTIZATIONS ("q4_k"), the format to which matrices that are not quantized yet are quantized while they are read.
    merge_adapter: the directory of a LoRA adapter that is merged into them first.

    Raises ModelNotFoundError if nothing is there, ModelFileError for anything damaged, missing or inconsistent,
    UnsupportedModelError for a feature that is not supported, ValueError for another `quantize`.
    """
    format = checked_format(quantize)
    path = Path(path)
    source: ModelSource
    opened: GGUFFile | HuggingFaceDirectory | None = None
    if path.is_dir() and (path / MARKER).is_file():
        from ferrum_jax.weights.orbax import open_checkpoint  # imports JAX, which is not needed to read a header

        source = open_checkpoint(path)
    elif path.is_dir() and ".partial-" in path.name:
        raise ModelFileError(f"{path}: is what an interrupted conversion left; convert the model again")
    else:
        opened = open_directory(path, header_only=header_only) if path.is_dir() else open_gguf(path, header_only=header_only)
        source = opened
    try:
        if opened is not None:
            _leave_out(opened)
            if not header_only:
                tie(opened, opened.tensors)
        if merge_adapter is not None:
            from ferrum_jax.weights.merging import Merged

            source = Merged(source, merge_adapter)
        return source if format is None else Quantized(source, format)
    except BaseException:
        source.close()
        raise


def _leave_out(opened: GGUFFile | HuggingFaceDirectory) -> None:
    """Drops tensors that the family ignores in the layers that have them."""
    table = next((family.tensors for family in families.sharing(opened.metadata.get("general.architecture"))), None)
    if table is None or not any(row.ignored for row in table.layer):
        return
    layers = opened.read_config().layers
    for name in list(opened.tensors):
        row, layer = table.find(name)
        if row and row.ignored and layer is not None and layer < len(layers) and row.ignored(layers[layer]):
            del opened.tensors[name]
