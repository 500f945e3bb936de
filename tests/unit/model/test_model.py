"""A loaded model as users see it: prompts in, completions out, and the same tokens from every method."""

import dataclasses
import gc
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import ferrum_jax as fj
from ferrum_jax.loading import auto_dtype
from ferrum_jax.weights.gguf import open_gguf
from pallas_kernels import native
from pallas_kernels.dispatch import Target
from support.tiny_gguf import write_tiny_llama

GREEDY = fj.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
NOISY = dataclasses.replace(GREEDY, temperature=1.5, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=96)


@pytest.fixture(scope="module")
def model(path):
    return fj.load(path, dtype="float32")


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


def test_nothing_stays_on_the_device_after_a_call(model):
    """Before Python collects cycles: the next call needs the same memory again."""
    gc.collect()
    gc.disable()
    try:
        before, threads = jax.live_arrays(), threading.active_count()
        model.generate(["abc"], GREEDY)
        list(model.stream("abc", GREEDY))
        known = set(map(id, before))
        assert not [array.shape for array in jax.live_arrays() if id(array) not in known]
        assert threading.active_count() == threads  # for each thread the C library keeps memory
    finally:
        gc.enable()


@pytest.mark.slow
def test_texts_and_ids_may_be_mixed_and_come_back_in_order(model):
    ids = model.tokenizer.encode("abc", add_special=True, parse_special=True)
    first, second, third = model.generate([ids, "abc", [5, 6, 7, 8, 9]], GREEDY)
    assert first.prompt_token_ids == second.prompt_token_ids == ids and first.token_ids == second.token_ids
    assert third.prompt_token_ids == [5, 6, 7, 8, 9]
    assert len(first.token_ids) == 12 and first.finish_reason == "length" and first.logprobs is None
    assert first.text == model.tokenizer.decode(first.token_ids)


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "sampled"])
@pytest.mark.slow
def test_stream_gives_the_tokens_of_generate(model, params):
    (whole,) = model.generate(["abc"], params)
    stream = model.stream("abc", params)
    pieces = list(stream)
    assert [id for _, ids in pieces for id in ids] == whole.token_ids == stream.token_ids
    assert "".join(text for text, _ in pieces) == whole.text == stream.text
    assert stream.finish_reason == whole.finish_reason


def test_a_stream_can_be_closed(model):
    stream = model.stream("abc", GREEDY)
    next(stream)
    stream.close()
    assert list(stream) == [] and len(stream.token_ids) >= 1


@pytest.mark.slow
def test_rows_do_not_see_each_other(model):
    prompts = [[3], [4] * 20, [5, 6, 7], list(range(33))]
    each = [dataclasses.replace(NOISY, seed=i, max_tokens=4 + i) for i in range(4)]
    together = model.generate(prompts, each)
    alone = [model.generate([p], q)[0] for p, q in zip(prompts, each, strict=True)]
    assert tokens_of(together) == tokens_of(alone)
    assert [len(c.token_ids) for c in together] == [4, 5, 6, 7]


@pytest.mark.slow
def test_logits_have_the_same_bits_alone_and_in_a_batch(model):
    prompts = [list(range(1, n + 1)) for n in (1, 2, 17, 40, 63)]
    together = model.logits(prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        assert (model.logits([prompt])[0].view(np.uint32) == logits.view(np.uint32)).all(), len(prompt)


@pytest.mark.slow
def test_more_prompts_than_one_program_takes(model, monkeypatch):
    prompts = [[i + 1, 7] for i in range(7)]
    expected = tokens_of(model.generate(prompts, GREEDY))
    monkeypatch.setattr("ferrum_jax.model._ROWS", 2)
    assert tokens_of(model.generate(prompts, GREEDY)) == expected


def test_a_stop_string_ends_the_text_before_it(model):
    (whole,) = model.generate(["abc"], GREEDY)
    stop = whole.text[3:5]
    stopped, other = model.generate(["abc", [9, 9]], dataclasses.replace(GREEDY, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)] and len(stopped.token_ids) < 12
    assert other.token_ids[:2] == model.generate([[9, 9]], GREEDY)[0].token_ids[:2]
    stream = model.stream("abc", dataclasses.replace(GREEDY, stop=(stop,)))
    assert "".join(text for text, _ in stream) == stopped.text and stream.finish_reason == "stop"


def test_an_end_token_is_in_the_ids_and_not_in_the_text(model, monkeypatch):
    (whole,) = model.generate(["abc"], GREEDY)
    end = whole.token_ids[4]
    monkeypatch.setattr(model.tokenizer, "eos_ids", frozenset({end}))
    count = whole.token_ids.index(end) + 1
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    for completion in (
        model.generate(["abc"], params)[0],
        model.generate(["abc"], dataclasses.replace(params, stop=("\0",)))[0],
    ):
        assert completion.token_ids == whole.token_ids[:count] and completion.finish_reason == "stop"
        assert completion.text == model.tokenizer.decode(whole.token_ids[: count - 1])


def test_logprobs_are_of_the_raw_distribution(model):
    (completion,) = model.generate(["abc"], dataclasses.replace(NOISY, logprobs=3))
    ids = completion.prompt_token_ids + completion.token_ids
    (logits,) = model.logits([ids])
    raw = np.asarray(jax.nn.log_softmax(logits))[len(completion.prompt_token_ids) - 1 : -1]
    for row, token, entries in zip(raw, completion.token_ids, completion.logprobs, strict=True):
        assert len(entries) == 4 and entries[0][0] == token
        assert [id for id, _ in entries[1:]] == np.argsort(-row, kind="stable")[:3].tolist()
        assert all(abs(value - row[id]) <= 1e-5 for id, value in entries)


@pytest.mark.slow
def test_generation_ends_with_the_context(model):
    (completion,) = model.generate([[3] * 90], dataclasses.replace(GREEDY, max_tokens=50))
    assert len(completion.token_ids) == 6 and completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "empty prompt"),
        ([""], "empty prompt"),
        ([[1], [64]], "token id 64 is out of range"),
        ([[-1]], "out of range"),
        ([[1.5]], "must be integers"),
        ([[3] * 96], "leaves no room in a context of 96"),
        ("abc", r"write \[prompt\]"),
    ],
)
def test_prompts_that_cannot_be(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, GREEDY)


def test_no_prompts_no_completions(model):
    assert model.generate([], GREEDY) == [] and model.logits([]) == []


def test_perplexity_is_that_of_the_logits(model):
    ids = np.random.default_rng(0).integers(0, 64, 75).tolist()

    def by_hand(windows):
        scores = []
        for window in windows:
            raw = np.asarray(jax.nn.log_softmax(model.logits([window])[0].astype(np.float32)))
            scores += raw[np.arange(len(window) - 1), window[1:]].tolist()
        return np.exp(-np.mean(scores))

    assert abs(model.perplexity(ids) / by_hand([ids]) - 1) <= 1e-5
    assert abs(model.perplexity(ids, window=20) / by_hand([ids[0:20], ids[20:40], ids[40:60]]) - 1) <= 1e-5
    for window, message in ((1, "at least two tokens"), (76, r"more than the text has \(75\)")):
        with pytest.raises(ValueError, match=message):
            model.perplexity(ids, window=window)


def test_every_weight_is_there_once(model, path):
    with open_gguf(path) as file:
        assert 0.95 <= model.memory()["parameters_total"] / file.tensor_bytes <= 1.05
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))


def test_programs_are_compiled_once(model):
    model.generate([[3, 4]], GREEDY)
    before = model.timings()["compile_s"]
    model.generate([[5, 6]], dataclasses.replace(NOISY, max_tokens=9))
    assert model.timings()["compile_s"] == before, "other values, same shapes"


def test_a_growing_conversation_meets_few_programs(model):
    shapes = {model._engine([[3] * n], [GREEDY])._executor.programs()[-1] for n in range(1, 80)}
    assert len(shapes) == 1


def test_a_mesh_of_one_device_is_that_device(path, model):
    device = jax.devices()[0]
    placed = fj.load(path, dtype="float32", mesh=Mesh([[device]], ("data", "tensor")))
    assert placed.device is model.device is device
    assert [leaf.sharding for leaf in jax.tree.leaves(placed.params)] == [
        leaf.sharding for leaf in jax.tree.leaves(model.params)
    ]
    with pytest.raises(ValueError, match="device and mesh are both given"):
        fj.load(path, mesh=Mesh([device], ("data",)), device=device)
    with pytest.raises(ValueError, match="an axis 'batch'; the axes of a mesh are data, expert, tensor"):
        fj.load(path, mesh=Mesh([device], ("batch",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"kv_dtype": "int3"}, "kv_dtype 'int3' is not supported"),
        ({"mesh": 2}, 'mesh must be a jax.sharding.Mesh or a text such as "expert=4,tensor=2", not 2'),
        ({"mesh": "expert=2,rows=4"}, "mesh: 'rows=4' in .* is not an axis"),
        ({"mesh": "expert=0"}, "mesh: 'expert=0' in .* and its number of devices"),
        ({"mesh": "tensor=2,tensor=2"}, "mesh: 'tensor=2' in"),
        ({"mesh": "data=2"}, "mesh: data=2 is not supported yet; models are cut over expert and tensor alone"),
        ({"mesh": "expert=64,tensor=64"}, "mesh: 'expert=64,tensor=64' has 4096 devices; JAX has 1, of cpu"),
        ({"device": "cpu"}, "must be a jax.Device"),
        ({"max_seq_len": 97}, "beyond the model's context of 96"),
        ({"max_seq_len": 1}, "at least 2"),
    ],
)
def test_arguments_that_cannot_be(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fj.load(path, **arguments)


@pytest.mark.slow
def test_half_precision_models_load_and_answer(path):
    for dtype in ("bfloat16", "float16"):
        model = fj.load(path, dtype=dtype)
        assert model.memory()["kv_bytes_per_token"] * 2 == fj.load(path, dtype="float32").memory()["kv_bytes_per_token"]
        assert len(model.generate(["abc"], GREEDY)[0].token_ids) == 12


def test_auto_takes_what_the_device_is_fast_at():
    on_cpu = "int8" if native.refusal() is None else "float32"
    kinds = {("cpu", ""): on_cpu, ("gpu", "7.5"): "float16", ("gpu", "9.0"): "bfloat16", ("tpu", "v5e"): "bfloat16"}
    assert {kind: auto_dtype(Target(*kind)) for kind in kinds} == kinds
    assert auto_dtype(Target("gpu")) == "bfloat16"


@pytest.mark.slow
def test_int8_is_for_cpus_and_keeps_its_cache_in_16_bits(path):
    model = fj.load(path, dtype="int8")
    assert model.kv_dtype == "float16" and model.config.activations == "float32"
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [5] * 20]
    together = model.generate(prompts, NOISY)
    assert tokens_of(together) == [model.generate([prompt], NOISY)[0].token_ids for prompt in prompts]


def test_progress_counts_the_bytes(path):
    calls = []
    fj.load(path, progress=lambda *call: calls.append(call))
    done, total, _ = calls[-1]
    with open_gguf(path) as file:
        assert done == total == file.tensor_bytes
