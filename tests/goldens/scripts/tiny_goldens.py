"""What the scripts for the goldens of tiny checkpoint directories share: transformers loads a directory, and its logits and
greedy tokens are stored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_model_goldens import greedy, logits

from support.goldens import golden_cases, tiny_models

torch.set_num_threads(1)


def build(path: Path, name: str, experts: bool) -> torch.nn.Module:
    """The model of a directory, of the class `name`, in float32 with eager attention and experts; every tensor is read."""
    extra = {"experts_implementation": "eager"} if experts else {}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **extra
    )
    assert type(model).__name__ == name
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval()


def write(tiny: Any, build: Callable[[Any, Path], torch.nn.Module], more: Callable = lambda spec, model, scratch: None) -> None:
    """The command line of a script: SCRATCH [NAME ...]. tiny: the module with the cases; more: is called with each case, its
    model and the folder."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    tiny.HERE.mkdir(exist_ok=True)
    for spec in (spec for spec in tiny.CASES if not names or spec.name in names):
        digest = tiny.write_directory(spec, scratch / spec.name)
        model, arrays = build(spec, scratch / spec.name), {}
        for i, ids in enumerate(tiny_models.prompts(spec.vocab, lengths=tiny.LENGTHS)):
            full = logits(model, ids)
            arrays[f"rows{i}"] = full[golden_cases.kept_rows(len(ids))]
            arrays[f"proj{i}"] = (full.astype(np.float64) @ golden_cases.projection(spec.vocab)).astype(np.float32)
            arrays[f"tokens{i}"], arrays[f"gaps{i}"] = greedy(model, ids, golden_cases.NEW_TOKENS)
        np.savez_compressed(tiny.HERE / f"{spec.name}.npz", digest=np.array(digest), **arrays)
        more(spec, model, scratch)
        gap = min(arrays[f"gaps{i}"].min() for i in range(len(tiny.LENGTHS)))
        print(f"{spec.name}: spread {arrays['rows3'].std():.2f}, smallest gap {gap:.4f}", flush=True)
