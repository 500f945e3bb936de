"""Golden logits and greedy tokens of the tiny models of Gemma, from transformers' own loading of the directories.

PYTHONPATH=tests python tests/goldens/scripts/make_gemma_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_model_goldens import greedy, logits

from support.goldens import golden_cases, tiny_models
from support.goldens import tiny_gemma as tiny

torch.set_num_threads(1)


def build(spec: tiny.Spec, path: Path) -> torch.nn.Module:
    """The model in float32 with eager attention."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == tiny.CLASSES[spec.arch][0]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval()


def main() -> None:
    """Command line."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    tiny.HERE.mkdir(exist_ok=True)
    for spec in tiny.CASES:
        if names and spec.name not in names:
            continue
        digest = tiny.write_directory(spec, scratch / spec.name)
        model, arrays = build(spec, scratch / spec.name), {}
        for i, ids in enumerate(tiny_models.prompts(spec.vocab, lengths=tiny.LENGTHS)):
            full = logits(model, ids)
            arrays[f"rows{i}"] = full[golden_cases.kept_rows(len(ids))]
            arrays[f"proj{i}"] = (full.astype(np.float64) @ golden_cases.projection(spec.vocab)).astype(np.float32)
            arrays[f"tokens{i}"], arrays[f"gaps{i}"] = greedy(model, ids, tiny.NEW_TOKENS)
        np.savez_compressed(tiny.HERE / f"{spec.name}.npz", digest=np.array(digest), **arrays)
        gap = min(arrays[f"gaps{i}"].min() for i in range(len(tiny.LENGTHS)))
        print(f"{spec.name}: spread {arrays['rows3'].std():.2f}, smallest gap {gap:.4f}", flush=True)


if __name__ == "__main__":
    main()
