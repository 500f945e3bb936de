"""Golden logits and greedy tokens of the tiny models with gated delta nets, from transformers' own loading of the directories,
and logits with an adapter of all projections, from PEFT.

PYTHONPATH=tests python tests/goldens/scripts/make_hybrid_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import peft.utils.transformers_weight_conversion as conversion
import torch
from make_model_goldens import logits
from tiny_goldens import build, write

from support.goldens import tiny_hybrids as tiny
from support.goldens import tiny_models

# Where transformers fuses experts, PEFT takes the projections of shared experts, which have the same names, for the experts'.
conversion._convert_peft_config_moe = lambda config, model: None


def adapted(spec: tiny.Spec, model: torch.nn.Module, path: Path) -> dict[str, np.ndarray]:
    """The logits of the prompts with the case's adapter next to the weights."""
    tiny.write_adapter(spec, path)
    adapted = peft.PeftModel.from_pretrained(model, path).eval()
    names = {name.removeprefix("base_model.model.") for name, part in adapted.named_modules() if hasattr(part, "lora_A")}
    assert names == {module for module, *_ in tiny.factors(spec)}, names
    return {
        f"logits{i}": logits(adapted, ids) for i, ids in enumerate(tiny_models.prompts(spec.vocab, lengths=tiny.LENGTHS[:2]))
    }


def write_adapted(spec: tiny.Spec, model: torch.nn.Module, scratch: Path) -> None:
    if spec.name in tiny.WITH_ADAPTER:
        arrays = adapted(spec, model, scratch / f"{spec.name}-adapter")
        np.savez_compressed(tiny.HERE / f"{spec.name}-adapter.npz", **arrays)


if __name__ == "__main__":
    write(tiny, lambda spec, path: build(path, tiny.CLASSES[spec.arch][0], bool(spec.experts)), write_adapted)
