"""Adapters on experts as PEFT writes them, at run time and merged: the numbers of the training's own forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from ferrum_jax.weights.adapter import read_adapter
from support.directories import MOE, edit, write

pytestmark = pytest.mark.slow

IDS = [list(range(3, 27)), list(range(40, 60))]
NAMES = ["both", "down", "gate_up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(dataclasses.replace(MOE, dtype="F32", layers=2), tmp_path_factory.mktemp("model") / "moe")


@pytest.fixture(scope="module")
def base(folder: Path) -> fj.Model:
    return fj.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def adapters(base: fj.Model, tmp_path_factory) -> dict[str, tuple[finetune.LoraAdapter, Path]]:
    """For both parameters of the experts, and for one of them."""
    made, path = {}, tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        targets = ("attention", "experts") if name == "both" else ("experts",)
        adapter = finetune.init(base, finetune.LoraConfig(rank=2 + seed, targets=targets), jax.random.key(seed))
        adapter = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), adapter)
        kept = {p: s for p, s in adapter.pairs.items() if name == "both" or p.endswith(f"expert_{name}")}
        adapter = dataclasses.replace(adapter, pairs=kept)
        made[name] = adapter, finetune.save_peft(adapter, path / name)
    return made


@pytest.fixture(scope="module")
def served(folder: Path, adapters) -> fj.Model:
    return fj.load(folder, dtype="float32", adapters={name: path for name, (_, path) in adapters.items()})


def loss_of(logits: list[np.ndarray]) -> float:
    """The mean over all tokens of IDS but the first ones."""
    rows = [jax.nn.log_softmax(row)[np.arange(len(ids) - 1), ids[1:]] for row, ids in zip(logits, IDS, strict=True)]
    return -float(np.concatenate(rows).mean())


@pytest.mark.parametrize("name", NAMES)
def test_at_run_time(name: str, base: fj.Model, served: fj.Model, adapters) -> None:
    batch = finetune.pack(map(finetune.Example, IDS), 64, base.config.vocab_size)
    batch = jax.tree.map(lambda array: array[0], batch)
    want = float(finetune.loss(base.params, adapters[name][0], batch, config=base.config))
    assert abs(loss_of(served.logits(IDS, name)) - want) <= 2e-5
    assert abs(loss_of(base.logits(IDS)) - want) >= 1e-2


def test_merged(folder: Path, served: fj.Model, adapters) -> None:
    merged = fj.load(folder, dtype="float32", merge_adapter=adapters["both"][1])
    for found, want in zip(merged.logits(IDS), served.logits(IDS, "both"), strict=True):
        assert np.abs(found - want).max() <= 1e-4


def test_each_row_has_its_own(base: fj.Model, served: fj.Model) -> None:
    """In one batch the tokens that a row has alone; without an adapter the logits of the model itself."""
    assert all(np.array_equal(*pair) for pair in zip(served.logits(IDS), base.logits(IDS), strict=True))
    params, names = fj.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True), ["both", None, "down", "gate_up"]
    mixed = served.generate([IDS[0]] * 4, params, names)
    alone = [served.generate([IDS[0]], params, name)[0].token_ids for name in names]
    assert [completion.token_ids for completion in mixed] == alone and len(set(map(tuple, alone))) == 4


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ([], r"key target_parameters: \[\] does not say which parameters the tensors of model\.layers\.0\.mlp\.experts are of"),
        (["mlp.experts.gate_up_proj"], r"does not say which parameters"),
        ("mlp", r"key target_parameters: must be a list of names, not \'mlp\'"),
    ],
)
def test_wrong_target_parameters(parameters, said: str, base: fj.Model, adapters, tmp_path: Path) -> None:
    out = finetune.save_peft(adapters["both"][0], tmp_path / "out")
    edit(out / "adapter_config.json", lambda content: content.update(target_parameters=parameters))
    with pytest.raises(fj.ModelFileError, match=said):
        read_adapter(out, base.config)
