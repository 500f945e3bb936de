"""The mistakes of a newcomer: each is one sentence that says what was given and what would be right."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import checks
from ferrum_jax.state import kv_dtype

MESSAGES = [{"role": "user", "content": "hi"}]
P = fj.SamplingParams


@pytest.fixture(scope="module")
def model():
    return fj.load("tiny", dtype="float32")


MODEL = {
    "messages": [
        lambda m: m.generate(MESSAGES), lambda m: m.generate(MESSAGES[0]), lambda m: m.generate([MESSAGES]),
        lambda m: m.stream(MESSAGES), lambda m: m._runtime.encode(MESSAGES), lambda m: m.trace_routing(MESSAGES),
    ],
    r"write \[prompt\]": [
        lambda m: m.generate("text"), lambda m: m.generate([1, 2]), lambda m: m.generate(np.array([1, 2])),
        lambda m: m.generate(b"text"),
    ],
    "prompts must be a list": [lambda m: m.generate(None), lambda m: m.generate(5)],
    "a list of texts": [
        lambda m: m.stream(["a"]), lambda m: m.stream(["a", "b"]), lambda m: m.generate([["a"]]),
        lambda m: m.trace_routing(["a"]),
    ],
    "a prompt must be a text": [lambda m: m.stream(None), lambda m: m.stream(5), lambda m: m.generate([None, "a"])],
    r"not ndarray \(array\(3\)\)": [
        lambda m: m.generate(np.array(3)), lambda m: m.stream(np.array(3)), lambda m: m.logits(np.array(3)),
        lambda m: m.logits([np.array(3)]), lambda m: m.perplexity(np.array(3)), lambda m: m.tokenizer.decode(np.array(3)),
    ],
    r"not set": [lambda m: m.stream({1, 2}), lambda m: m.perplexity({1, 2}), lambda m: m.logits([{1, 2}])],
    "token ids must be a list": [lambda m: m.logits(jnp.array([1, 2]))],
    "must be SamplingParams": [
        lambda m: m.generate(["a"], None), lambda m: m.generate(["a"], 5), lambda m: m.generate(["a"], {"max_tokens": 5}),
        lambda m: m.generate(["a"], "greedy"), lambda m: m.stream("a", None), lambda m: m.stream("a", [P()]),
        lambda m: m.generate(["a"], [{}]), lambda m: m.stream("a", {"max_tokens": 5}),
    ],
    "1 prompts and 2 sampling parameters": [lambda m: m.generate(["a"], [P(), P()])],
    "not bool": [lambda m: m.generate([[True]]), lambda m: m.logits([[True]]), lambda m: m.perplexity([True, False, True])],
    "not float": [lambda m: m.generate([[1.0]]), lambda m: m.logits([[1.0]]), lambda m: m.logits(np.ones((1, 2)))],
    "tokenizer.encode": [lambda m: m.logits("text"), lambda m: m.logits(["text"])],
    "a batch must be lists": [lambda m: m.logits(None), lambda m: m.logits(5), lambda m: m.logits({"a": 1})],
    r"write \[1\]": [lambda m: m.logits([1, 2])],
    "the text has no tokens": [lambda m: m.perplexity(""), lambda m: m.perplexity([])],
    "the text has 1 token;": [lambda m: m.perplexity("a")],
    "window must be None or an integer": [
        lambda m: m.perplexity("a b c", 1), lambda m: m.perplexity("a b c", "2"), lambda m: m.perplexity("a b c", 2.0),
        lambda m: m.perplexity("a b c", True), lambda m: m.perplexity("a b c", np.array([1, 2])),
        lambda m: m.perplexity("a b c", int),
    ],
    "no more than the text has": [lambda m: m.perplexity("a b c", 400)],
    "does not fit into a context of 512": [
        lambda m: m.perplexity([1] * 600), lambda m: m.perplexity([1] * 600, 513),
    ],
    "token ids must be": [lambda m: m.perplexity(None), lambda m: m.perplexity(5), lambda m: m.perplexity(["a", "b"])],
}  # fmt: skip
CALLS = [pytest.param(says, call, id=f"{says}-{i}") for says, calls in MODEL.items() for i, call in enumerate(calls)]


@pytest.mark.parametrize(("says", "call"), CALLS)
def test_a_model_says_what_would_be_right(model, says, call):
    with pytest.raises(ValueError, match=says) as caught:
        call(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.slow
def test_what_is_right_in_another_form_is_taken(model):
    greedy = P(max_tokens=2, temperature=0.0)
    expected = [done.token_ids for done in model.generate([[1, 2]], greedy)]
    for prompts in (([1, 2] for _ in range(1)), np.array([[1, 2]]), jnp.array([[1, 2]]), ((np.int32(1), 2),)):
        assert [done.token_ids for done in model.generate(prompts, greedy)] == expected
    ids = [1, 2, 3, 4]
    np.testing.assert_array_equal(model.logits(np.array([ids]))[0], model.logits([ids])[0])
    assert model.perplexity(np.array(ids)) == model.perplexity(ids) == model.perplexity(ids, np.int64(4))
    assert model.logits([]) == [] and model.generate([]) == []


TOKENIZER = {
    "encode_batch": [lambda t: t.encode(["a"])],
    "a text must be a str": [
        lambda t: t.encode(5), lambda t: t.encode(None), lambda t: t.encode(b"a"), lambda t: t.encode_batch([1]),
    ],
    r"write \[text\]": [lambda t: t.encode_batch("abc"), lambda t: t.encode_batch(None)],
    r"write \[5\]": [lambda t: t.decode(5)],
    "must be a list of integers": [lambda t: t.decode("abc"), lambda t: t.decode(None)],
    "must be integers": [
        lambda t: t.decode(["a"]), lambda t: t.decode([1.5]), lambda t: t.decode([True]), lambda t: t.decode([[1]]),
        lambda t: t.token_bytes("a"), lambda t: t.token_bytes(1.5), lambda t: t.token_bytes([1]), lambda t: t.is_control("a"),
    ],
}  # fmt: skip
CALLS = [pytest.param(says, call, id=f"{says}-{i}") for says, calls in TOKENIZER.items() for i, call in enumerate(calls)]


@pytest.mark.parametrize(("says", "call"), CALLS)
def test_a_tokenizer_says_what_would_be_right(model, says, call):
    with pytest.raises(ValueError, match=says):
        call(model.tokenizer)


def test_a_tokenizer_takes_ids_of_any_kind(model):
    tokenizer = model.tokenizer
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(jnp.array(ids)) == tokenizer.decode(iter(ids)) == "hello"
    assert tokenizer.token_bytes(np.int64(5)) == tokenizer.token_bytes(5)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int8"])
def test_dtypes_of_jax_and_numpy_are_names(name):
    for value in (getattr(jnp, name), jnp.dtype(name), name):
        assert checks.dtype_name(value) == name == kv_dtype(value)
    if name != "bfloat16":
        assert checks.dtype_name(getattr(np, name)) == name


def test_load_takes_dtypes_of_jax_and_calls_fp8_by_one_name():
    model = fj.load("tiny", dtype=jnp.float32, kv_dtype=jnp.float8_e4m3fn, max_seq_len=np.int64(64))
    assert (model.config.dtype, model.kv_dtype, model.max_seq_len) == ("float32", "float8_e4m3fn", 64)
    assert kv_dtype("fp8") == kv_dtype("float8_e4m3fn") == kv_dtype(jnp.float8_e4m3fn)
    for call in (lambda: fj.load("tiny", kv_dtype="float8"), lambda: fj.EngineConfig(kv_dtype="float8")):
        with pytest.raises(ValueError, match=r"kv_dtype 'float8' is not supported; supported: .*int8, fp8$"):
            call()


LOAD = [
    ({"source": None}, "source must be a path or a name"), ({"source": 5}, "source must be a path or a name"),
    ({"source": ["tiny"]}, "source must be a path or a name"), ({"source": b"tiny"}, "source must be a path or a name"),
    ({"dtype": None}, "dtype None"), ({"dtype": 5}, "dtype 5"), ({"dtype": np.float64}, "supported: auto, float32"),
    ({"dtype": np.ones(2)}, r"dtype 'ndarray \(array"), ({"kv_dtype": np.float32(2)}, "kv_dtype"),
    ({"kv_dtype": 5}, "kv_dtype 5"), ({"kv_dtype": ""}, "kv_dtype ''"),
    ({"progress": True}, "progress must be a function"), ({"merge_adapter": 5}, "merge_adapter"),
    ({"adapters": {"a": 5}}, "a, the directory of an adapter"), ({"max_seq_len": True}, "max_seq_len"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), LOAD)
def test_load_says_what_would_be_right(arguments, says):
    with pytest.raises(ValueError, match=says):
        fj.load(**{"source": "tiny", **arguments})


def test_a_seed_of_minus_one_is_a_new_one_each_time(model):
    assert P(seed=-1) == P(seed=None) == P(seed=np.int64(-1))
    assert P(seed=-2).seed == 2**32 - 2
    texts = {model.generate(["Once"], P(max_tokens=12, seed=-1))[0].text for _ in range(4)}
    assert len(texts) > 1
    assert len({model.generate(["Once"], P(max_tokens=12, seed=7))[0].text for _ in range(2)}) == 1


def test_objects_are_a_line(model):
    assert repr(model) == "<Model qwen3moe, 4 layers, 6.7 MiB, float32, context 512, cpu:0>"
    assert repr(model.tokenizer) == "<Tokenizer of 4,096 tokens, no chat template>"
    engine = repr(fj.Engine(model, fj.EngineConfig(max_seqs=2, num_pages=8)))
    assert engine == f"<Engine of {model!r}, 2 sequences, 8 pages of 16>"
    assert repr(model.stream("a")) == "<Stream of <Request 0 waiting, 0 tokens>>"
