"""Golden losses and gradients of fine-tuning, from PEFT and transformers: of 20 steps, with what PEFT saves after them, and of
one step of further families.

Of this project it uses only the generators of the directories. torch, transformers and peft are needed here and nowhere in the
tests.

    PYTHONPATH=tests python tests/goldens/scripts/make_finetune_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import peft
import peft.utils.transformers_weight_conversion as conversion
import tiny_goldens
import torch
from make_directory_goldens import build

from support.goldens import finetune_cases as cases
from support.goldens import finetune_families as families
from support.goldens.tiny_directories import write

torch.set_num_threads(1)


def main() -> None:
    """Command line."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    for case in cases.CASES:
        if not names or case.name in names:
            make(case, scratch / case.name)
    for name in families.CASES:
        if not names or name in names:
            make_family(name, scratch / name)


def make(case: cases.Case, path: Path) -> None:
    """One file."""
    digest = write(case.spec, path)
    base = build(case.spec, path)
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=case.alpha, use_rslora=case.rslora, task_type="CAUSAL_LM",
        target_modules=list(cases.ATTENTION if case.spec.experts else cases.ATTENTION + cases.DENSE),
        target_parameters=list(cases.EXPERTS) if case.spec.experts else None,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    initial = {name: torch.from_numpy(values) for name, values in cases.factors(case).items()}
    report = peft.set_peft_model_state_dict(model, initial)
    assert not report.unexpected_keys and not [key for key in report.missing_keys if "lora" in key]
    parameters = {name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad}
    assert parameters.keys() == initial.keys(), parameters.keys() ^ initial.keys()
    losses, gradients = [], []
    for rows in cases.batches(case):
        loss = model(**batch(rows)).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([cases.summary(case, name, parameters[name].grad.numpy()) for name in sorted(parameters)])
        with torch.no_grad():
            for value in parameters.values():
                value -= case.rate * value.grad
    saved = peft.get_peft_model_state_dict(model)
    after = [cases.summary(case, name, saved[name].detach().numpy()) for name in sorted(parameters)]
    shapes = [list(saved[name].shape) for name in sorted(saved)]
    arrays = {"losses": losses, "gradients": gradients, "after": after, "names": sorted(saved), "shapes": shapes}
    cases.HERE.mkdir(exist_ok=True)
    np.savez_compressed(cases.HERE / f"{case.name}.npz", digest=digest, **arrays)
    print(f"{case.name}: losses {losses[0]:.3f} to {losses[-1]:.3f}, {len(saved)} tensors", flush=True)


MODULES = (
    *cases.ATTENTION, *cases.DENSE, "out_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "in_proj_qkv", "in_proj_z",
    "in_proj_a", "in_proj_b", "in_proj_ba", "in_proj", "w1", "w2", "w3",
)  # fmt: skip
# Where transformers fuses experts, PEFT takes the projections of shared experts, which have the same names, for the experts'.
conversion._convert_peft_config_moe = lambda config, model: None


def make_family(name: str, path: Path) -> None:
    """One file of one step."""
    case = families.CASES[name]
    digest = case.write(case.spec, path)
    base = tiny_goldens.build(path, case.model_class, bool(case.experts))
    linear = (name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear))
    config = peft.LoraConfig(
        r=families.RANK, lora_alpha=families.ALPHA, task_type="CAUSAL_LM",
        target_modules=[name for name in linear if name.rpartition(".")[2] in MODULES],
        target_parameters=list(cases.EXPERTS) if case.experts else None,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    named = {name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(torch.from_numpy(families.factor(case, key, value.shape)))
    loss = model(**batch(families.batch(case))).loss
    loss.backward()
    keys = sorted(named)
    arrays = {
        "loss": loss.item(), "names": keys, "shapes": [list(named[key].shape) for key in keys],
        "gradients": [families.summary(case, key, named[key].grad.numpy()) for key in keys],
    }  # fmt: skip
    np.savez_compressed(cases.HERE / f"family-{name}.npz", digest=digest, **arrays)
    print(f"{name}: loss {loss.item():.3f}, {len(keys)} tensors", flush=True)


def batch(rows: list[cases.Sequence]) -> dict[str, torch.Tensor]:
    """The sequences, padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    ids, labels, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        size = len(row.tokens)
        ids[number, :size], mask[number, :size] = torch.tensor(row.tokens), 1
        labels[number] = -100
        labels[number, :size] = torch.where(torch.tensor(row.learned), ids[number, :size], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
