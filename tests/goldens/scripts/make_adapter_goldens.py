"""Golden logits and greedy tokens of the tiny LoRA adapters, from PEFT and transformers.

transformers loads the checkpoint in float32, PEFT the adapter; the numbers are those after `merge_and_unload`, checked
against the ones that PEFT computes with the adapter beside the weights. Of this project it uses only the generators of
the directories. torch, transformers and peft are needed here and nowhere in the tests.

    PYTHONPATH=tests python tests/goldens/scripts/make_adapter_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import peft
import peft.utils.transformers_weight_conversion as conversion
import torch
from make_directory_goldens import build
from make_model_goldens import golden, logits

from support.goldens import adapter_cases as cases
from support.goldens import tiny_adapters as tiny
from support.goldens.tiny_directories import write as write_base
from support.goldens.tiny_models import prompts

torch.set_num_threads(1)
# Where transformers fuses experts, PEFT takes the projections of dense layers, which have the same names, for the experts'.
conversion._convert_peft_config_moe = lambda config, model: None


def main() -> None:
    """Command line."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    for spec in cases.CASES:
        if names and spec.name not in names:
            continue
        digests = [write_base(spec.base, scratch / spec.base.name), tiny.write(spec, scratch / spec.name)]
        base = build(spec.base, scratch / spec.base.name)
        ids = prompts(spec.base.vocab)[1]
        before = logits(base, ids)
        model = peft.PeftModel.from_pretrained(base, scratch / spec.name).eval()
        adapted = {name.removeprefix("base_model.model.") for name, part in model.named_modules() if hasattr(part, "lora_A")}
        assert adapted == set(tiny.shapes(spec)), adapted ^ set(tiny.shapes(spec))
        beside = logits(model, ids)
        merged = model.merge_and_unload()
        arrays = golden(merged, spec.base.vocab)
        change = np.abs(beside - before).max()
        assert np.abs(logits(merged, ids) - beside).max() <= 1e-4 and change >= 1.0
        np.savez_compressed(cases.HERE / f"{spec.name}.npz", digest=np.array("+".join(digests)), **arrays)
        gap = min(arrays[f"gaps{i}"].min() for i in range(3))
        print(f"{spec.name}: spread {arrays['rows2'].std():.2f}, changed by {change:.2f}, smallest gap {gap:.4f}", flush=True)


if __name__ == "__main__":
    main()
