"""The committed cases of fine-tuning: packed checkpoints, initial adapters and batches, the same on every machine.

Each has `<name>.npz` in tests/goldens/finetune, made by make_finetune_goldens.py: 20 steps of plain gradient descent by PEFT in
float32, on the matrices that the packing stands for. Of gradients and adapters it has the norm and products with fixed
directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from support import GOLDENS
from support.goldens import tiny_directories as tiny
from support.goldens.tiny_directories import Packing, Spec
from support.goldens.tiny_models import bell, raw

HERE = GOLDENS / "finetune"
STEPS, DIRECTIONS = 20, 2
ATTENTION, DENSE = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the adapter: its rank, alpha and the learning rate."""

    spec: Spec
    rank: int = 4
    alpha: float = 8.0
    rate: float = 0.003
    rslora: bool = False

    @property
    def name(self) -> str:
        return self.spec.name


_SMALL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ff": 96, "dtype": "F16"}
_GPTQ = Packing("gptq", 4, 32, symmetric=False)
_MOE = {**_SMALL, "experts": 4, "top_k": 2, "expert_ff": 32, "packing": _GPTQ}
CASES = [
    Case(Spec("llama", "LlamaForCausalLM", **_SMALL, packing=_GPTQ, seed=81)),
    Case(Spec("qwen2", "Qwen2ForCausalLM", **{**_SMALL, "head_dim": 16}, tied=True, packing=_GPTQ, config={"head_dim": None},
              seed=82), rank=3, rslora=True),
    Case(Spec("qwen3moe", "Qwen3MoeForCausalLM", **_MOE, config={"norm_topk_prob": True}, seed=83)),
    Case(Spec("mixtral", "MixtralForCausalLM", **_MOE, seed=84)),
]  # fmt: skip


def factors(case: Case) -> dict[str, np.ndarray]:
    """The initial adapter, float32 by the names of PEFT's file. B is not zero, so that A has a gradient from the start."""
    spec, found = case.spec, {}
    shapes = {
        module: shape
        for module, shape, _ in tiny.matrices(spec)
        if ".experts." not in module and module.rpartition(".")[2] in ATTENTION + DENSE
    }
    for layer in range(spec.layers if spec.experts else 0):
        module = f"model.layers.{layer}.mlp.experts"
        shapes[f"{module}.base_layer"] = 2 * spec.expert_ff, spec.hidden
        shapes[module] = spec.hidden, spec.expert_ff
    for module, (rows, columns) in shapes.items():
        rank = case.rank * (spec.experts if ".experts" in module else 1)
        name = f"base_model.model.{module}.lora_"
        a, b = (rank, columns), (rows, rank)
        found[f"{name}A.weight"] = bell(spec.seed, name + "A", a) * np.float32(1 / math.sqrt(columns))
        found[f"{name}B.weight"] = bell(spec.seed, name + "B", b) * np.float32(0.1)
    return found


class Sequence(NamedTuple):
    """Token ids, and which of them are targets."""

    tokens: list[int]
    learned: list[bool]


def batches(case: Case) -> list[list[Sequence]]:
    """Three sequences for each step."""
    found = []
    for step in range(STEPS):
        rows = []
        for row, length in enumerate((7 + step % 5, 16, 11 - step % 4)):
            draw = raw(case.spec.seed, f"batch {step} {row}", 2 * length)
            tokens = (draw[:length] % np.uint64(40)).astype(int).tolist()
            learned = (draw[length:] % np.uint64(3) > 0).tolist()
            rows.append(Sequence(tokens, [*learned[:-1], True]))
        found.append(rows)
    return found


def summary(case: Case, name: str, values: np.ndarray) -> np.ndarray:
    """The norm of a tensor, and its products with fixed directions: float64."""
    values = values.astype(np.float64)
    along = (bell(case.spec.seed, f"{name} {i}", values.shape).astype(np.float64) for i in range(DIRECTIONS))
    return np.array([np.linalg.norm(values), *((values * direction).sum() for direction in along)])
