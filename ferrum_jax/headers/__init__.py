"""Headers of checkpoints as JSON, without tokenizers and places of tensors, and the headers that are part of the package.

A header becomes a `GGUFFile` without a file: its configuration and parameter table are made like those of any other. The header
of another kind of checkpoint states its configuration directly.
"""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.hub import ALIASES
from ferrum_jax.weights.ggml_types import BY_NAME
from ferrum_jax.weights.gguf import GGUFFile
from ferrum_jax.weights.source import ModelSource

BUNDLED = {
    "qwen3:30b-a3b": "qwen3-30b-a3b-q4_k_m.json",
    "qwen3.5:0.8b": "qwen3.5-0.8b-q4_k_m.json",
    "qwen3.5:2b": "qwen3.5-2b-q4_k_m.json",
    "qwen3.5:4b": "qwen3.5-4b-q4_k_m.json",
    "qwen3.5:9b": "qwen3.5-9b-q4_k_m.json",
    "qwen3.5:27b": "qwen3.6-27b-q4_k_m.json",  # the same sizes
    "qwen3.5:35b-a3b": "qwen3.6-35b-a3b-q4_k_m.json",
    "qwen3.6:27b": "qwen3.6-27b-q4_k_m.json",
    "qwen3.6:35b-a3b": "qwen3.6-35b-a3b-q4_k_m.json",
    "gpt-oss:20b": "gpt-oss-20b-mxfp4.json",
    "glm4.5:air": "glm-4.5-air-q4_k_m.json",
    "glm4.7:flash": "glm-4.7-flash-q4_k_m.json",
    "deepseek-v2:lite": "deepseek-v2-lite-q4_k_m.json",
    **{f"gemma3:{size}": f"gemma-3-{size}-it-q4_k_m.json" for size in ("4b", "12b", "27b")},
    **{f"gemma4:{size}": f"gemma-4-{size}-it-q4_k_m.json" for size in ("e2b", "e4b", "26b-a4b", "31b")},
    **{f"lfm2:{size}": f"lfm2-{size}-q4_k_m.json" for size in ("1.2b", "8b-a1b")},
}
"""By alias; made by tests/goldens/scripts/make_plan_header.py. Files of repositories that use other mixes differ in the
types of some tensors."""


def to_json(source: ModelSource) -> str:
    """{"metadata": {key: value}, "tensors": [[name, format, shape]]}, shapes with the slowest axis first; for a checkpoint that
    is not a GGUF file {"metadata", "config": fields of ModelConfig, "tensors": [[name, format, shape, bytes, whether the
    columns are in another order]]}."""
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in source.metadata.items()
        if not key.startswith("tokenizer.")
    }
    if source.is_gguf:
        return json.dumps({"metadata": metadata, "tensors": [[t.name, t.format, t.shape] for t in source.tensors.values()]})
    tensors = [[name, t.format, t.shape, t.nbytes, t.order is not None] for name, t in source.tensors.items()]
    return json.dumps({"metadata": metadata, "config": dataclasses.asdict(source.config()), "tensors": tensors})


def from_json(text: str, path: Path) -> GGUFFile:
    """The header as a file named `path` in errors, whose tensors cannot be read. Numbers in lists become arrays."""
    header = json.loads(text)
    metadata = {
        key: np.asarray(value) if isinstance(value, list) and not any(isinstance(v, str) for v in value) else value
        for key, value in header["metadata"].items()
    }
    tensors = {}
    for name, format, shape, *known in header["tensors"]:
        order = None
        if known:
            nbytes, ordered = known
            if ordered:
                columns = (*shape[:-2], shape[-1])
                order = TensorInfo(name, "I32", columns, path, 0, 4 * math.prod(columns))
        else:
            kind = BY_NAME[format]
            nbytes = math.prod(shape) // kind.block_size * kind.block_bytes
        tensors[name] = TensorInfo(name, format, tuple(shape), path, 0, nbytes, order)
    if "config" in header:
        return _Configured((path,), metadata, tensors, {}, ModelConfig.from_fields(header["config"]))
    return GGUFFile((path,), metadata, tensors, {})


class _Configured(GGUFFile):
    """A header whose configuration is known already."""

    is_gguf = False

    def __init__(self, parts: Any, metadata: Any, tensors: Any, files: Any, config: ModelConfig):
        super().__init__(parts, metadata, tensors, files)
        self._config = config

    def read_config(self) -> ModelConfig:
        return self._config


def bundled(model: str) -> GGUFFile | None:
    """The header in the package for an alias, or None."""
    alias = ALIASES.get(model.strip().lower().removesuffix(":latest"))
    name = BUNDLED.get(alias.name) if alias else None
    return from_json(resources.files(__name__).joinpath(name).read_text("utf-8"), Path(name)) if name else None
