"""Tiny models of further families, trained for one step: what their layers do that those of finetune_cases.py do not.

Each has `family-<name>.npz` in tests/goldens/finetune, made by make_finetune_goldens.py: the loss and the gradients of one
batch in float32, with PEFT's names of the factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.goldens import adapter_cases, tiny_directories, tiny_gemma, tiny_hybrids, tiny_latent, tiny_mixtures
from support.goldens.finetune_cases import Sequence
from support.goldens.tiny_models import bell, raw

RANK, ALPHA = 3, 6.0


class Case(NamedTuple):
    """A model, and the function that writes it to a directory."""

    spec: Any
    write: Callable[[Any, Path], str]
    model_class: str

    @property
    def experts(self) -> int:
        """Their number."""
        return getattr(self.spec, "experts", 0)


def _of(module: Any, name: str, **changes: Any) -> Case:
    spec = dataclasses.replace(next(spec for spec in module.CASES if spec.name == name), **changes)
    kind = getattr(spec, "kind", None) or spec.arch
    known = module.CLASSES[kind]
    return Case(spec, module.write_directory, known if isinstance(known, str) else known[0])


CASES = {
    "qwen35": _of(tiny_hybrids, "qwen35", layers=2, attends=(1,)),
    "qwen3next": _of(tiny_hybrids, "qwen3next", layers=2, attends=(0,), experts=4, top_k=2),
    "lfm2": _of(tiny_mixtures, "lfm2", layers=2, attends=(1,), dense=2),
    "glm4moe": _of(tiny_mixtures, "glm4moe", layers=2, experts=4, top_k=2),
    "deepseek3": _of(tiny_latent, "deepseek3", layers=2, experts=4, top_k=2, groups=2, groups_used=1),
    "gemma3": _of(tiny_gemma, "gemma3", slides=(True, False), window=8),
    "gpt-oss": Case(adapter_cases.OSS, tiny_directories.write, "GptOssForCausalLM"),
}


def factor(case: Case, name: str, shape: Iterable[int]) -> np.ndarray:
    """The initial numbers of a factor, by its name in PEFT's file. B is not zero, so that A has a gradient."""
    shape = tuple(shape)
    scale = 1 / math.sqrt(shape[1]) if "lora_A" in name else 0.1
    return bell(case.spec.seed, name, shape) * np.float32(scale)


def batch(case: Case) -> list[Sequence]:
    """Sequences that are shorter and longer than a chunk of a delta net and a window."""
    rows = []
    for row, length in enumerate((9, 70, 21)):
        draw = raw(case.spec.seed, f"batch {row}", 2 * length)
        learned = (draw[length:] % np.uint64(3) > 0).tolist()
        rows.append(Sequence((draw[:length] % np.uint64(300)).astype(int).tolist(), [*learned[:-1], True]))
    return rows


def summary(case: Case, name: str, values: np.ndarray) -> np.ndarray:
    """The norm of a tensor, and its product with a fixed direction: float64."""
    values = values.astype(np.float64)
    return np.array([np.linalg.norm(values), (values * bell(case.spec.seed, f"{name} 0", values.shape)).sum()])
