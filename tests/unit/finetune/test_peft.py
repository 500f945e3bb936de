"""Fine-tuning against PEFT: losses and gradients of 20 steps, on compressed weights, and the directory that is saved."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from ferrum_jax.finetune.lora import LoraAdapter
from ferrum_jax.weights.safetensors import parse_header
from support.finetuning import filled, tensors_of
from support.goldens import finetune_cases as cases
from support.goldens.tiny_directories import write

CASES = {case.name: case for case in cases.CASES}


class Trained:
    """A case, run here: its losses, the summaries of its gradients and of the adapter after it."""

    def __init__(self, case: cases.Case, path: Path) -> None:
        self.case, self.digest = case, write(case.spec, path)
        self.model = fj.load(path, dtype="float32")
        config = finetune.LoraConfig(rank=case.rank, alpha=case.alpha, rslora=case.rslora)
        self.adapter = filled(finetune.init(self.model, config, jax.random.key(0)), cases.factors(case))
        step = jax.jit(functools.partial(_step, config=self.model.config, rate=case.rate))
        self.losses, self.gradients = [], []
        for rows in cases.batches(case):
            examples = [finetune.Example(*row) for row in rows]
            batch = jax.tree.map(lambda array: array[0], finetune.pack(examples, 40, case.spec.vocab))
            loss, slope, self.adapter = step(self.model.params, self.adapter, batch)
            self.losses.append(float(loss))
            self.gradients.append(self.summaries(slope))

    def summaries(self, adapter: LoraAdapter) -> np.ndarray:
        return np.array([cases.summary(self.case, name, values) for name, values in sorted(tensors_of(adapter).items())])


def _step(params, adapter, batch, *, config, rate):
    loss, slope = jax.value_and_grad(finetune.loss, argnums=1)(params, adapter, batch, config=config)
    return loss, slope, jax.tree.map(lambda value, along: value - rate * along, adapter, slope)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By name, each run once."""
    known: dict[str, Trained] = {}

    def run(name: str) -> Trained:
        if name not in known:
            known[name] = Trained(CASES[name], tmp_path_factory.mktemp("finetune") / name)
        return known[name]

    return run


def golden(case: cases.Case, digest: str) -> dict[str, np.ndarray]:
    with np.load(cases.HERE / f"{case.name}.npz") as file:
        found = dict(file)
    assert str(found["digest"]) == digest
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name: str, trained) -> None:
    """Each loss, and each gradient's norm and its products with random directions, relative to the norm."""
    run = trained(name)
    want = golden(run.case, run.digest)
    assert np.abs(np.array(run.losses) / want["losses"] - 1).max() <= 1e-4
    error = np.abs(np.array(run.gradients) - want["gradients"]) / want["gradients"][..., :1]
    assert error.max() <= 1e-4
    after = np.abs(run.summaries(run.adapter) - want["after"]) / want["after"][..., :1]
    assert after.max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved(name: str, trained, tmp_path: Path) -> None:
    """The names, shapes and numbers that PEFT saves."""
    run = trained(name)
    want = golden(run.case, run.digest)
    out = finetune.save_peft(run.adapter, tmp_path / "out", base_model=name)
    file = out / "adapter_model.safetensors"
    with file.open("rb") as opened:
        tensors = parse_header(file, opened.fileno(), file.stat().st_size)
        stored = {key: np.frombuffer(file.read_bytes(), "<f4", np.prod(i.shape), i.offset) for key, i in tensors.items()}
    assert sorted(tensors) == want["names"].tolist()
    assert [list(tensors[key].shape) for key in sorted(tensors)] == want["shapes"].tolist()
    for key, values in tensors_of(run.adapter).items():
        assert np.array_equal(stored[key].reshape(values.shape), values), key
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_parameters"] == (sorted(cases.EXPERTS) if run.case.spec.experts else None)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (run.case.rank, run.case.alpha, run.case.rslora)
    with pytest.raises(FileExistsError, match="out exists"):
        finetune.save_peft(run.adapter, out)
