"""Tiny models of every architecture against transformers in float32.

The numbers in tests/goldens/models were made by code that shares nothing with this package (see tests/goldens/scripts). Each
case is loaded and compiled once; its file is rebuilt from a seed, or committed where llama.cpp quantized it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import ferrum_jax as fj
from support.golden_checks import check_greedy, check_logits
from support.goldens import golden_cases, tiny_models


@pytest.fixture(scope="module", params=golden_cases.CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case; the digest ties the file to the numbers."""
    case = request.param
    with np.load(golden_cases.HERE / f"{case.name}.npz") as file:
        golden = dict(file)
    if case.quantized:
        path = golden_cases.HERE / f"{case.name}.gguf"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        path = tmp_path_factory.mktemp("golden") / f"{case.name}.gguf"
        digest = tiny_models.write(case.spec, path)
    assert digest == str(golden["digest"]), f"{path.name} is not the file its goldens were made from"
    return fj.load(path, dtype="float32"), golden, tiny_models.prompts(case.spec.vocab, lengths=case.lengths)


def test_logits(loaded) -> None:
    check_logits(*loaded)


@pytest.mark.slow
def test_greedy_tokens(loaded) -> None:
    check_greedy(*loaded)
