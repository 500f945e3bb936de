"""`save_peft`: an adapter as PEFT writes it, adapter_config.json and adapter_model.safetensors in one directory.

The names come from the table of the model's family. Experts are what PEFT calls target_parameters: `mlp.experts.gate_up_proj`
is the inner of two wrappers and `mlp.experts.down_proj` the outer one, lora_A is [experts * rank, in] with the expert
outermost, and lora_B [out, rank * experts] with the rank outermost.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ferrum_jax import checks, families
from ferrum_jax.config import LayerSpec
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families.table import Change, Part
from ferrum_jax.finetune.lora import MATRICES, LoraAdapter
from ferrum_jax.finetune.names import peft_name
from ferrum_jax.weights.fresh import flush, fresh


def save_peft(adapter: LoraAdapter, path: str | Path, *, base_model: str = "") -> Path:
    """Writes an adapter as a directory that PEFT loads, and `load(..., adapters=...)`.

    Args:
      adapter: of a model that transformers knows.
      path: the directory; it must not exist, or be empty.
      base_model: the name of the model, which PEFT shows.

    Returns:
      The path.

    Raises:
      FileExistsError: if there is something at `path`.
      UnsupportedModelError: if PEFT has no name for one of its matrices.
    """
    path = Path(checks.path(path, "path")).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists")
    tensors, modules = named_factors(adapter)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model or None, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0, "modules_to_save": None, "r": adapter.config.rank, "use_rslora": adapter.config.rslora,
        "target_modules": sorted(modules.targets), "target_parameters": sorted(modules.parameters) or None,
    }  # fmt: skip
    with fresh(path, sum(array.nbytes for array in tensors.values())) as partial:
        partial.mkdir()
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        _write(partial / "adapter_model.safetensors", tensors)
        flush(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    return path


def named_factors(adapter: LoraAdapter) -> tuple[dict[str, np.ndarray], _Modules]:
    """The tensors of PEFT's file, float32 by name, and the modules that they are of."""
    modules, tensors = _Modules(adapter), {}
    for name, (a, b) in modules.factors():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    return tensors, modules


class _Modules:
    """The adapter's factors by the names of PEFT; `targets`, `parameters`: what its configuration lists."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self.adapter = adapter
        self.family = families.of_architecture(adapter.model.architecture, "save_peft")
        self.targets: set[str] = set()
        self.parameters: set[str] = set()

    def factors(self) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """The name of each module, and A and B as PEFT has them."""
        names = {path: names for members in MATRICES.values() for path, names in members}
        for path, sliced in self.adapter.pairs.items():
            known = peft_name(self.family, (path.partition(".")[0], names[path][0]))
            if known is None:
                raise UnsupportedModelError(f"architecture {self.adapter.model.architecture}: PEFT has no name for {path}")
            for layer, label in enumerate(sliced.labels):
                if label:
                    a, b = (np.asarray(x[sliced.labels[:layer].count(label)], np.float32) for x in sliced.groups[label])
                    lead = f"{self.family.tensors.prefix}{layer}."
                    if known.part is not None:
                        yield self._of_experts(lead, known.part, a, b)
                    else:
                        self.targets.add(lead + known.name)
                        spec = self.adapter.model.layers[layer]
                        yield f"base_model.model.{lead}{known.name}", _changed(known.change, spec, a, b)

    def _of_experts(self, lead: str, part: Part, a: np.ndarray, b: np.ndarray) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
        module, _, parameter = part.tensor.rpartition(".")
        self.parameters.add(part.tensor)
        experts, rank, _ = a.shape
        if part.interleaved:  # rows of gate and up lie in turn
            b = np.stack(np.split(b, 2, axis=1), axis=2).reshape(b.shape)
        both = {"feed_forward.expert_gate_up", "feed_forward.expert_down"} <= self.adapter.pairs.keys()
        inner = ".base_layer" if both and parameter == "gate_up_proj" else ""
        b = b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts)
        return f"base_model.model.{lead}{module}{inner}", (a.reshape(experts * rank, -1), b)


def _changed(change: Change | None, spec: LayerSpec, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors with columns and rows as the module has them."""
    if change and change.columns:
        a = a[:, np.argsort(change.columns(spec))]
    if change and change.rows:
        b = b[np.argsort(change.rows(spec))]
    return a, b


def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of float32 arrays."""
    header, at = {}, 0
    for name, array in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, array in sorted(tensors.items()):
            out.write(np.ascontiguousarray(array, "<f4").tobytes())
