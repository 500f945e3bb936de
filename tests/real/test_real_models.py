"""Two real models against transformers in float32 on exactly dequantized weights.

SmolLM2-135M (arch llama, Q4_1) and Qwen2.5-Coder-0.5B (arch qwen2, mostly Q5_0). Goldens: tests/goldens/real, made by
tests/goldens/scripts/make_model_goldens.py; token ids there are llama.cpp's.
"""

from __future__ import annotations

import numpy as np
import pytest

import ferrum_jax as fj
from support import GOLDENS
from support.goldens import golden_cases

pytestmark = pytest.mark.real
PROMPTS = range(4)  # of 6, 17, 130 and 400 tokens
LARGEST = 1e-3
TIE = 2e-3


@pytest.fixture(scope="module", params=["smollm2", "qwen25"])
def loaded(request):
    """(model, golden arrays) of one real model in exact arithmetic."""
    path = request.getfixturevalue(f"{request.param}_path")
    with np.load(GOLDENS / "real" / f"{request.param}.npz") as file:
        return fj.load(path, dtype="float32"), dict(file)


def test_logits(loaded) -> None:
    model, golden = loaded
    for i in PROMPTS:
        ids = golden[f"prompt{i}"].tolist()
        (full,) = model.logits([ids])
        assert full.shape == (len(ids), model.config.vocab_size)
        rows = full[golden_cases.kept_rows(len(ids))]
        best = np.take_along_axis(rows, golden[f"top_ids{i}"], axis=-1)
        assert np.abs(best - golden[f"top{i}"]).max() <= LARGEST, f"prompt {i}"
        probed = rows[:, golden_cases.probe_ids(full.shape[1])]
        assert np.abs(probed - golden[f"probe{i}"]).max() <= LARGEST, f"prompt {i}"
        assert (rows.max(axis=-1) <= golden[f"top{i}"][:, 0] + LARGEST).all(), f"prompt {i}: another token is best"


def test_greedy_tokens(loaded) -> None:
    model, golden = loaded
    params = fj.SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    completions = model.generate([golden[f"prompt{i}"].tolist() for i in PROMPTS], params)
    for i, completion in zip(PROMPTS, completions, strict=True):
        expected = golden[f"tokens{i}"]
        assert len(completion.token_ids) == len(expected)
        different = np.flatnonzero(np.array(completion.token_ids) != expected)
        if different.size:
            at = different[0]
            assert golden[f"gaps{i}"][at] < TIE, f"prompt {i}: token {at} differs and is no near tie"


def test_token_ids_of_the_text(loaded) -> None:
    model, golden = loaded
    text = (GOLDENS / "real" / "text.txt").read_text(encoding="utf-8")
    assert model.tokenizer.encode(text, add_special=False) == golden["text"].tolist()


@pytest.mark.parametrize("window", [512, None])
def test_perplexity(loaded, window: int | None) -> None:
    model, golden = loaded
    expected = float(golden["perplexity512" if window else "perplexity"])
    text = (GOLDENS / "real" / "text.txt").read_text(encoding="utf-8")
    assert model.perplexity(text, window=window) == pytest.approx(expected, rel=2e-4)
