"""Headers of GGUF files as JSON, without tokenizer and places of tensors, and those that come with the package.

A header reads as a `GGUFFile` that has no file: configuration and parameter table are made from it as from any other.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np

from ferrum_jax.hub import ALIASES
from ferrum_jax.weights.ggml_types import BY_NAME
from ferrum_jax.weights.gguf import GGUFFile, TensorInfo

BUNDLED = {"qwen3:30b-a3b": "qwen3-30b-a3b-q4_k_m.json"}
"""By alias; made by tests/goldens/scripts/make_plan_header.py."""


def to_json(gguf: GGUFFile) -> str:
    """{"metadata": {key: value}, "tensors": [[name, format, shape]]}, shapes with the slowest axis first."""
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in gguf.metadata.items()
        if not key.startswith("tokenizer.")
    }
    return json.dumps({"metadata": metadata, "tensors": [[t.name, t.format, t.shape] for t in gguf.tensors.values()]})


def from_json(text: str, path: Path) -> GGUFFile:
    """The header as a file that errors call `path` and whose tensors cannot be read. Numbers in lists become arrays."""
    header = json.loads(text)
    metadata = {
        key: np.asarray(value) if isinstance(value, list) and not any(isinstance(v, str) for v in value) else value
        for key, value in header["metadata"].items()
    }
    tensors = {}
    for name, format, shape in header["tensors"]:
        kind = BY_NAME[format]
        nbytes = math.prod(shape) // kind.block_size * kind.block_bytes
        tensors[name] = TensorInfo(name, format, tuple(shape), path, 0, nbytes)
    return GGUFFile((path,), metadata, tensors, {})


def bundled(model: str) -> GGUFFile | None:
    """The header that comes with the package for an alias, or None."""
    alias = ALIASES.get(model.strip().lower().removesuffix(":latest"))
    name = BUNDLED.get(alias.name) if alias else None
    return from_json(resources.files(__name__).joinpath(name).read_text("utf-8"), Path(name)) if name else None
