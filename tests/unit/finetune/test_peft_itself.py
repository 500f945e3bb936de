"""The saved directory in PEFT itself, where torch and PEFT are installed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from support.finetuning import filled
from support.goldens import finetune_cases as cases
from support.goldens import tiny_directories as tiny

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_peft_loads_what_was_saved(case: cases.Case, tmp_path: Path) -> None:
    """transformers and PEFT give the log-probabilities of the training's own forward pass."""
    tiny.write(case.spec, tmp_path / "packed")
    model = fj.load(tmp_path / "packed", dtype="float32")
    config = finetune.LoraConfig(rank=case.rank, alpha=case.alpha, rslora=case.rslora)
    adapter = filled(finetune.init(model, config, jax.random.key(0)), cases.factors(case))
    (tmp_path / "dense").mkdir()
    entries = [(name, "F32", v.shape, tiny.to_bytes(v, "F32")) for name, v in tiny.dense(case.spec)]
    (tmp_path / "dense" / "model.safetensors").write_bytes(tiny.safetensors(entries))
    plain = {key: value for key, value in tiny.config_json(case.spec).items() if key != "quantization_config"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(plain))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, finetune.save_peft(adapter, tmp_path / "out")).eval()
    ids = list(range(3, 33))
    with torch.no_grad():
        want = torch.log_softmax(loaded(torch.tensor([ids])).logits[0], -1)[range(29), ids[1:]].numpy()
    batch = jax.tree.map(lambda array: array[0], finetune.pack([finetune.Example(ids)], 30, case.spec.vocab))
    assert abs(float(finetune.loss(model.params, adapter, batch, config=model.config)) + want.mean()) <= 1e-4
