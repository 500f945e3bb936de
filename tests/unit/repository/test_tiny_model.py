"""The model that comes with the package: it is small, trained, a mixture of experts, and llama.cpp's too."""

import json
import subprocess
import sys

import numpy as np
import pytest

import ferrum_jax as fj
from support import ROOT
from training import corpus, data, peer, train


@pytest.fixture(scope="module")
def tiny() -> fj.Model:
    return fj.load("tiny", dtype="float32")


def test_file_is_small_and_its_card_is_of_it():
    size = train.OUT.stat().st_size
    assert size <= train.LARGEST
    assert f"{size:,} bytes" in (ROOT / "docs" / "tiny-model-card.md").read_text(encoding="utf-8")
    assert corpus.OUT.stat().st_size <= corpus.LARGEST


@pytest.mark.slow
def test_it_tells_stories(tiny):
    """Held-out text: far below the 12 bits per token of an untrained model; and every expert of every layer is used."""
    _, held_out = data.split(corpus.read_stories())
    ids = [token for story in held_out[:16] for token in tiny.tokenizer.encode(story)]
    assert tiny.perplexity(ids, window=256) <= 20
    routing = tiny.trace_routing(ids[:500])
    assert routing.expert_ids.shape == (4, 500, 2)
    for layer in routing.expert_ids:
        assert np.bincount(layer.ravel(), minlength=8).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_llama_cpp_predicts_the_same(dtype):
    golden = json.loads(peer.OUT.read_text())
    assert peer.agreement(fj.load("tiny", dtype=dtype), golden["texts"], golden["llama.cpp"]) >= 0.95


@pytest.mark.slow
def test_run_without_a_model(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ferrum_jax",
        "run",
        "--prompt",
        "Once upon a time",
        "--max-tokens",
        "30",
        "--temperature",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 10
