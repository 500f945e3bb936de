"""Tiny models of every architecture against transformers in float32.

The numbers in tests/goldens/models were made by code that shares nothing with this package (see the script beside it).
Each case is loaded and compiled once; its file is rebuilt from a seed, or committed where llama.cpp quantised it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "goldens" / "models"))
import golden_cases
import tiny_models

LARGEST = 1e-3  # of any logit
RMS = 1e-4  # over a prompt's rows; float32 noise gives 1e-6 to 2e-5, a wrong eps 1e-3 and more
PROJECTED = 5e-4  # every row on fixed random directions
TIE = 2e-3  # where the two best logits are closer, the next greedy token may be either


@pytest.fixture(scope="module", params=golden_cases.CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case; the digest ties the file to the numbers."""
    case = request.param
    with np.load(golden_cases.HERE / f"{case.name}.npz") as file:
        golden = dict(file)
    if case.quantised:
        path = golden_cases.HERE / f"{case.name}.gguf"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        path = tmp_path_factory.mktemp("golden") / f"{case.name}.gguf"
        digest = tiny_models.write(case.spec, path)
    assert digest == str(golden["digest"]), f"{path.name} is not the file its goldens were made from"
    return fj.load(path, dtype="float32"), golden, tiny_models.prompts(case.spec.vocab)


def test_logits(loaded) -> None:
    model, golden, prompts = loaded
    vocab = golden["rows0"].shape[1]
    for i, (ids, full) in enumerate(zip(prompts, model.logits(prompts), strict=True)):
        assert full.shape == (len(ids), vocab) and full.dtype == np.float32
        error = np.abs(full[golden_cases.kept_rows(len(ids))] - golden[f"rows{i}"])
        assert error.max() <= LARGEST, f"{len(ids)} tokens"
        assert np.sqrt(np.mean(error**2)) <= RMS, f"{len(ids)} tokens"
        projected = full.astype(np.float64) @ golden_cases.projection(vocab)
        assert np.abs(projected - golden[f"proj{i}"]).max() <= PROJECTED, f"{len(ids)} tokens"


def test_greedy_tokens(loaded) -> None:
    model, golden, prompts = loaded
    params = fj.SamplingParams(temperature=0.0, max_tokens=golden_cases.NEW_TOKENS, ignore_eos=True)
    for i, completion in enumerate(model.generate(prompts, params)):
        expected = golden[f"tokens{i}"]
        assert len(completion.token_ids) == len(expected) and completion.finish_reason == "length"
        different = np.flatnonzero(np.array(completion.token_ids) != expected)
        if different.size:
            at = different[0]
            assert golden[f"gaps{i}"][at] < TIE, f"prompt {i}: token {at} differs and is no near tie"
