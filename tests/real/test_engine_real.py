"""The engine on a real model: the tokens of `generate`, and what the dtypes of the KV cache cost in perplexity.

Perplexity goes through the pages as decoding does: the text is a prompt computed in pieces, attention reads all keys and
values from the cache, and the scores of tokens that were decoded one by one are required to be the same. It is taken over
the whole text, because over a few hundred tokens chance moves an 8-bit cache's by half a percent either way.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.state import KV_DTYPES, bytes_per_token

pytestmark = pytest.mark.real
TEXT = Path(__file__).resolve().parents[1] / "goldens" / "real" / "text.txt"
PIECE = 64  # tokens
# e4m3 has three bits of mantissa: over 20,480 tokens it costs this model 0.65 % (docs/numerics.md), int8 0.11 %.
MOST_PERCENT = {"float32": 0.0, "bfloat16": 0.05, "float16": 0.05, "int8": 0.5, "float8_e4m3fn": 1.0}


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> fj.Model:
    return fj.load(smollm2_path, dtype="float32")


@pytest.fixture(scope="module")
def ids(model: fj.Model) -> list[int]:
    return model.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special=False)


def engine_of(model: fj.Model, dtype: str) -> fj.Engine:
    return fj.Engine(model, fj.EngineConfig(num_pages=124, max_seqs=1, token_budget=PIECE, kv_dtype=dtype))


def prompt_scores(engine: fj.Engine, ids: list[int]) -> np.ndarray:
    """Log-probabilities of all tokens but the first."""
    before = engine.metrics()["steps"]
    completion = engine.submit(ids, fj.SamplingParams(max_tokens=1, prompt_logprobs=0)).result()
    assert completion.finish_reason == "length"
    assert engine.metrics()["steps"] - before == -(-len(ids) // PIECE)  # all of it was computed, in pieces
    assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
    found = [entry[0] for entry in completion.prompt_logprobs[1:] if entry is not None]
    assert [id for id, _ in found] == ids[1:]
    return np.array([value for _, value in found])


def test_mixed_requests_equal_generate(model: fj.Model, ids: list[int]) -> None:
    """Prompts of very different lengths, greedy and sampled, with more of them than slots: tokens and logprobs."""
    lengths = (1, 7, 16, 33, 60)
    prompts = [ids[40 * i : 40 * i + n] for i, n in enumerate(lengths)]
    params = [
        fj.SamplingParams(max_tokens=8 + 4 * i, temperature=i % 2, top_p=0.9, seed=i, logprobs=2, ignore_eos=True)
        for i in range(len(prompts))
    ]
    engine = fj.Engine(model, fj.EngineConfig(num_pages=20, max_seqs=2, token_budget=16))
    requests = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    engine.run()
    for request, expected in zip(requests, model.generate(prompts, params), strict=True):
        found = request.result()
        assert found.finish_reason == expected.finish_reason == "length"
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.logprobs == expected.logprobs


def test_perplexity_of_kv_dtypes_through_pages(model: fj.Model, ids: list[int]) -> None:
    losses, text = {}, ids[: 31 * PIECE]
    for dtype in KV_DTYPES:
        engine = engine_of(model, dtype)
        scores = prompt_scores(engine, text)
        assert np.isfinite(scores).all()
        losses[dtype] = -scores.mean()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._executor.state))
        assert held == engine.num_pages * 16 * bytes_per_token(model.config, dtype)
    exact = losses["float32"]
    change = {dtype: 100 * abs(np.exp(loss - exact) - 1) for dtype, loss in losses.items()}
    assert all(change[dtype] <= MOST_PERCENT[dtype] for dtype in KV_DTYPES), change
    sizes = [bytes_per_token(model.config, dtype) for dtype in KV_DTYPES]
    heads = model.config.num_layers * model.config.num_kv_heads
    values = 2 * heads * model.config.head_dim
    assert sizes == [4 * values, 2 * values, 2 * values, values + 2 * heads * 4, values]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_decoded_tokens_score_as_in_a_prompt(model: fj.Model, ids: list[int], dtype: str) -> None:
    """Decoding reads the pages as a prompt in pieces does, so the perplexity above is that of decoding."""
    engine = engine_of(model, dtype)
    params = fj.SamplingParams(max_tokens=24, temperature=1.0, seed=3, logprobs=0, ignore_eos=True)
    decoded = engine.submit(ids[:20], params).result()
    assert decoded.logprobs is not None
    scores = prompt_scores(engine, [*ids[:20], *decoded.token_ids])
    np.testing.assert_allclose([entry[0][1] for entry in decoded.logprobs], scores[19:], rtol=0, atol=1e-5)
