"""Tiny random LoRA adapters of the tiny checkpoint directories, the same bytes on every machine.

A directory is a function of its `Spec` alone, as the checkpoints of tiny_directories are, and laid out as PEFT's
`save_pretrained` lays it out. The factors are large enough that what they add is about half as large as the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.goldens import tiny_directories as tiny
from support.goldens.tiny_models import bell

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Spec:
    """What a tiny adapter is. `modules`: last words of the projections that it adapts, in `layers` (None: in all);
    `rank_pattern` and `alpha_pattern`: as in PEFT's configuration; `old`: the configuration has the keys of 2023 alone."""

    name: str
    base: tiny.Spec
    modules: tuple[str, ...] = ATTENTION + DENSE
    layers: tuple[int, ...] | None = None
    rank: int = 8
    alpha: float = 16
    rslora: bool = False
    dtype: str = "F32"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    old: bool = False
    seed: int = 1


def shapes(s: Spec) -> dict[str, tuple[int, int]]:
    """The adapted modules and the shapes of their weights."""
    found = {}
    for module, shape, _ in tiny.matrices(s.base):
        layer = int(module.split(".")[2])
        if module.rpartition(".")[2] in s.modules and ".experts." not in module and (s.layers is None or layer in s.layers):
            found[module] = shape
    return found


def of_module(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of a pattern without regular expressions for a module: of the first key, in PEFT's order, that its name ends
    with (or, if the key begins with ^, equals)."""
    for key, value in sorted(pattern.items()):
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith("." + key)):
            return value
    return default


def scale(s: Spec, module: str) -> float:
    """The factor of B A."""
    rank = of_module(s.rank_pattern, module, s.rank)
    return of_module(s.alpha_pattern, module, s.alpha) / (math.sqrt(rank) if s.rslora else rank)


def tensors(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of the tensors, before they are rounded to the adapter's dtype."""
    for module, (rows, columns) in shapes(s).items():
        rank = of_module(s.rank_pattern, module, s.rank)
        name = f"base_model.model.{module}.lora_"
        spread = 0.6 / (scale(s, module) * math.sqrt(rank))
        yield name + "A.weight", bell(s.seed, name + "A", (rank, columns)) * np.float32(1 / math.sqrt(columns))
        yield name + "B.weight", bell(s.seed, name + "B", (rows, rank)) * np.float32(spread)


def deltas(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """What the adapter adds to the weights of each module: float64 [out, in]."""
    stored = {
        name: tiny.from_bytes(tiny.to_bytes(values, s.dtype), s.dtype).reshape(values.shape) for name, values in tensors(s)
    }
    for module in shapes(s):
        a, b = (stored[f"base_model.model.{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        yield module, scale(s, module) * b @ a


def adapter_config(s: Spec) -> dict[str, Any]:
    """The content of adapter_config.json."""
    modules = list(s.modules) if s.layers is None and not s.base.dense else list(shapes(s))
    made: dict[str, Any] = {
        "base_model_name_or_path": s.base.name, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "lora_alpha": s.alpha, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": s.rank,
        "target_modules": modules, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if s.old:
        return made | {"enable_lora": None, "merge_weights": False}
    return made | {
        "alora_invocation_tokens": None, "alpha_pattern": s.alpha_pattern, "arrow_config": None, "auto_mapping": None,
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
        "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_ga_config": None,
        "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "peft_version": "0.21.2",
        "qalora_group_size": 16, "rank_pattern": s.rank_pattern, "revision": None, "target_parameters": None,
        "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
        "use_rslora": s.rslora, "velora_config": None,
    }  # fmt: skip


def write(s: Spec, path: Path) -> str:
    """Write the directory and return its digest: sha256 over the configuration and every tensor's name, shape and bytes."""
    path.mkdir(parents=True, exist_ok=True)
    config = json.dumps(adapter_config(s), indent=2, sort_keys=True)
    digest = hashlib.sha256(config.encode())
    entries = [(name, s.dtype, values.shape, tiny.to_bytes(values, s.dtype)) for name, values in tensors(s)]
    for name, dtype, shape, data in entries:
        digest.update(f"{name} {dtype} {shape}".encode() + data)
    (path / "adapter_config.json").write_text(config)
    (path / "adapter_model.safetensors").write_bytes(tiny.safetensors(entries))
    return digest.hexdigest()
