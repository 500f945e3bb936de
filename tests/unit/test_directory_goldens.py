"""Tiny checkpoint directories of every model class and packing against transformers in float32.

The numbers in tests/goldens/directories were made by transformers' own loading of the same directories (see the script
beside it); the bounds are those of the GGUF files' goldens.
"""

from __future__ import annotations

import numpy as np
import pytest
from directories import directory_cases, tiny_directories
from test_model_goldens import LARGEST, PROJECTED, RMS, TIE, golden_cases, tiny_models

import ferrum_jax as fj


def name_of(case: tiny_directories.Spec) -> str:
    return case.name


@pytest.fixture(scope="module", params=directory_cases.CASES, ids=name_of)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case; the digest ties the files to the numbers."""
    spec = request.param
    with np.load(directory_cases.HERE / f"{spec.name}.npz") as file:
        golden = dict(file)
    path = tmp_path_factory.mktemp("directory") / spec.name
    assert tiny_directories.write(spec, path) == str(golden["digest"]), "not the files that the goldens were made from"
    return fj.load(path, dtype="float32"), golden, tiny_models.prompts(spec.vocab)


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


@pytest.mark.parametrize("loaded", [case for case in directory_cases.CASES if not case.packing], ids=name_of, indirect=True)
def test_greedy_tokens(loaded) -> None:
    model, golden, prompts = loaded
    params = fj.SamplingParams(temperature=0.0, max_tokens=golden_cases.NEW_TOKENS, ignore_eos=True)
    for i, completion in enumerate(model.generate(prompts, params)):
        expected = golden[f"tokens{i}"]
        assert len(completion.token_ids) == len(expected) and completion.finish_reason == "length"
        different = np.flatnonzero(np.array(completion.token_ids) != expected)
        if different.size:
            assert golden[f"gaps{i}"][different[0]] < TIE, f"prompt {i}: token {different[0]} differs and is no near tie"
