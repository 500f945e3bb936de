"""Tiny checkpoint directories of every model class and packing against transformers in float32.

The numbers in tests/goldens/directories were made by transformers' own loading of the same directories (see
tests/goldens/scripts); the bounds are those of the GGUF files' goldens.
"""

from __future__ import annotations

import numpy as np
import pytest

import ferrum_jax as fj
from support.golden_checks import check_greedy, check_logits
from support.goldens import directory_cases, tiny_directories, tiny_models

# Quick are one of each model class and of each packing.
QUICK = ("llama3-bf16", "mistral-f32", "qwen2-window-f16", "qwen3-f16", "mixtral-bf16", "qwen3moe-f32")
QUICK += ("gptq-llama", "awq-llama", "compressed-qwen3")
PARAMS = [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in directory_cases.CASES]


def name_of(case: tiny_directories.Spec) -> str:
    return case.name


@pytest.fixture(scope="module", params=PARAMS, ids=name_of)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case; the digest ties the files to the numbers."""
    spec = request.param
    with np.load(directory_cases.HERE / f"{spec.name}.npz") as file:
        golden = dict(file)
    path = tmp_path_factory.mktemp("directory") / spec.name
    assert tiny_directories.write(spec, path) == str(golden["digest"]), "not the files that the goldens were made from"
    return fj.load(path, dtype="float32"), golden, tiny_models.prompts(spec.vocab)


def test_logits(loaded) -> None:
    check_logits(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [case for case in directory_cases.CASES if not case.packing], ids=name_of, indirect=True)
def test_greedy_tokens(loaded) -> None:
    check_greedy(*loaded)
