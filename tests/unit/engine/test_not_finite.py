"""Logits that are NaN or infinite: every way of generating ends with "error" and the reason, for any size of vocabulary.

XLA's maximum of 4,096 numbers or more loses NaN on a CPU, so one vocabulary here is larger than that and one is smaller.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import functional
from ferrum_jax.choice import NOT_FINITE, Choice, choose
from ferrum_jax.cli import main
from ferrum_jax.sampling import Sampling
from support.goldens import tiny_encoders
from support.tiny_gguf import write_tiny_llama

GREEDY = fj.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
WAYS = {
    "greedy": GREEDY,
    "sampled": dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, seed=3),
    "scored": dataclasses.replace(GREEDY, logprobs=2),
    "biased": dataclasses.replace(GREEDY, logit_bias={3: 1.0}),
}


@pytest.fixture(scope="module", params=[64, 5000])
def model(request, tmp_path_factory):
    path = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", vocab=request.param)
    model = fj.load(path, dtype="float32")
    model.params = {**model.params, "final_norm": model.params["final_norm"] * np.nan}
    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_generate_and_stream_end_with_an_error(model, way):
    for completion in model.generate([[5, 6], [7]], WAYS[way]):
        assert completion.finish_reason == "error" and "not finite" in completion.error and completion.token_ids == []
    stream = model.stream([5, 6], WAYS[way])
    assert list(stream) == [] and stream.finish_reason == "error" and "not finite" in stream.error


def test_chat_ends_with_an_error(model):
    assert model.chat([{"role": "user", "content": "the"}], GREEDY).finish_reason == "error"


def test_scores_say_so(model):
    with pytest.raises(fj.NotFiniteError, match="no perplexity"):
        model.perplexity([5, 6, 7, 8])
    (completion,) = model.generate([[5, 6, 7]], dataclasses.replace(GREEDY, prompt_logprobs=1))
    assert completion.finish_reason == "error"


def test_a_router_that_is_not_finite_is_an_error():
    model = fj.load("tiny", dtype="float32", max_seq_len=32)
    model.params = jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, model.params)
    with pytest.raises(fj.NotFiniteError, match="weights of the experts are not finite"):
        model.trace_routing([5, 6])


@pytest.mark.slow
def test_the_pure_program_marks_the_place(model):
    sampling = Sampling.from_params([GREEDY, GREEDY], eos_ids=[2], vocab_limit=model.config.vocab_size)
    run = functools.partial(functional.generate, config=model.config, max_tokens=4)
    prompts, lengths = jnp.asarray([[5, 6], [7, 0]], jnp.int32), jnp.asarray([2, 1], jnp.int32)
    cache = functional.new_cache(model.config, num_pages=2)
    tokens, made, _ = jax.jit(run)(model.params, cache, prompts, lengths, sampling, jax.random.key(0))
    assert tokens.tolist() == [[NOT_FINITE, -1, -1, -1]] * 2 and made.tolist() == [0, 0]


@pytest.mark.parametrize("vocab", [7, 4096, 5000])
def test_one_bad_number_ends_its_row_alone(vocab):
    logits = np.random.default_rng(0).normal(size=(5, vocab)).astype(np.float32)
    logits[1, vocab - 2], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, 1:] = -np.inf  # a single id that can be sampled is enough
    sampling = Sampling.from_params([GREEDY] * 5, eos_ids=[2], vocab_limit=vocab)
    zero, flag = jnp.zeros(5, jnp.int32), jnp.zeros(5, bool)
    before = Choice(zero + 3, zero, flag, jnp.zeros((5, vocab), jnp.int32))
    choice, chosen = choose(jnp.asarray(logits), before, sampling, jax.random.key(0), ~flag)
    assert chosen.token.tolist() == [int(logits[0].argmax()), NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
    assert choice.done.tolist() == [False, True, True, True, False] and choice.generated.tolist() == [1, 0, 0, 0, 1]


def test_an_embedding_that_is_not_finite_is_an_error(tmp_path):
    case = tiny_encoders.CASES[0]
    tiny_encoders.write_directory(case, tmp_path)
    model = fj.load(tmp_path)
    model.params = jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == jnp.float32 else leaf, model.params)
    with pytest.raises(fj.NotFiniteError, match="embedding of text 0"):
        model.embed(["one", "two"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", [["run", "--prompt", "the"], ["run", "--prompt", "the", "--output-format", "jsonl"], ["bench"]]
)
def test_the_command_line_says_so(monkeypatch, capsys, verb):
    def damaged(*args, **options):
        model = load(*args, **options)
        model.params = {**model.params, "final_norm": model.params["final_norm"] * np.nan}
        return model

    load = fj.load
    monkeypatch.setattr(fj, "load", damaged)
    lengths = ["--prompt-len", "8", "--gen-len", "4"] if verb == ["bench"] else []
    assert main([*verb, *lengths, "--dtype", "float32"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].endswith("the model's logits are not finite")
    assert "jsonl" not in verb or json.loads(out.splitlines()[-1])["finish_reason"] == "error"
