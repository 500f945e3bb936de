"""all-MiniLM-L6-v2 against transformers in float32, and against itself in other batches.

Goldens: tests/goldens/real/minilm.npz, made by tests/goldens/scripts/make_encoder_goldens.py.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import ferrum_jax as fj
from support import GOLDENS
from support.goldens import tiny_encoders

pytestmark = pytest.mark.real
PROSE = (GOLDENS / "real" / "text.txt").read_text(encoding="utf-8")
TEXTS = [*tiny_encoders.TEXTS, *(PROSE[i : i + 40 * (i // 400 + 1)] for i in range(0, 4000, 400))]


@pytest.fixture(scope="module")
def model(minilm_path) -> fj.EmbeddingModel:
    return fj.load(minilm_path)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "real" / "minilm.npz") as file:
        return dict(file)


def test_embeddings(model, golden) -> None:
    assert model.config.pooling == "mean" and model.max_seq_len == 256
    assert [model.tokenizer.encode(text, parse_special=True) for text in TEXTS] == [
        golden[f"ids{i}"].tolist() for i in range(len(TEXTS))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of them is too long
        vectors = model.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and np.abs(vectors - golden["vectors"]).max() <= 1e-5


def test_sentences_that_mean_the_same_are_near(model) -> None:
    iron, metal, pasta = model.embed(["Iron rusts in water.", "This metal corrodes when it is wet.", "Cook the pasta."])
    assert iron @ metal > 0.5 and iron @ pasta < 0.3


def test_quantized(model, minilm_path) -> None:
    small = fj.load(minilm_path, quantize="q8_0")
    assert small.memory()["parameters_total"] < 0.35 * model.memory()["parameters_total"]
    assert (small.embed(TEXTS) * model.embed(TEXTS)).sum(axis=1).min() >= 0.999
