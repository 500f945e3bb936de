"""Golden losses and gradients of 20 steps of fine-tuning, from PEFT and transformers, and what PEFT saves after them.

Of this project it uses only the generators of the directories. torch, transformers and peft are needed here and nowhere in the
tests.

    PYTHONPATH=tests python tests/goldens/scripts/make_finetune_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import peft
import torch
from make_directory_goldens import build

from support.goldens import finetune_cases as cases
from support.goldens.tiny_directories import write

torch.set_num_threads(1)


def main() -> None:
    """Command line."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    for case in cases.CASES:
        if not names or case.name in names:
            make(case, scratch / case.name)


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
