"""Ids against llama.cpp's (goldens made by tests/goldens/scripts/make_tokenizer_goldens.py), streaming, and bad
files."""

import gzip
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_jax.engine.watcher import Watcher
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.tokenizer import StopMatcher, TextStream, Tokenizer
from support import GOLDENS, environment


def load(name: str) -> dict:
    data = json.loads(gzip.decompress((GOLDENS / "tokenizer" / f"{name}.json.gz").read_bytes()))
    keys = data["metadata"]
    keys["tokenizer.ggml.token_type"] = np.array(keys["tokenizer.ggml.token_type"], np.int32)
    if "tokenizer.ggml.scores" in keys:
        keys["tokenizer.ggml.scores"] = np.array(keys["tokenizer.ggml.scores"], np.float32)
    return data


BPE, SPM, TIES = load("bpe"), load("spm"), load("spm_ties")


def bpe(pre: str = "gpt-2", **more: object) -> Tokenizer:
    keys = BPE["metadata"] | {"tokenizer.ggml.pre": pre} | {f"tokenizer.ggml.{key}": more[key] for key in more}
    return Tokenizer.from_gguf(keys, "small.gguf")


def check(tokenizer: Tokenizer, texts: list[str], answer: dict) -> None:
    for text, plain, special in zip(texts, answer["plain"], answer["special"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, repr(text)
        assert tokenizer.encode(text, add_special=True, parse_special=True) == special, repr(text)
    assert sorted(tokenizer.eos_ids) == answer["end_ids"]


@pytest.mark.parametrize("pre", sorted(BPE["pre"]))
def test_byte_level_ids(pre: str) -> None:
    check(bpe(pre), BPE["texts"], BPE["answers"][BPE["pre"][pre]])


@pytest.mark.parametrize(("pre", "count"), [("glm4", 1), ("llama-bpe", 1), ("chatglm-bpe", 4), ("qwen2", 4)])
def test_a_word_that_merges_do_not_reach(pre: str, count: int) -> None:
    """It is one token where the tokenizer.json of the models has `ignore_merges`; newer llama.cpp (the tree in
    llama-cpp-python 0.3.36) has it for glm4, too."""
    tokens = [*BPE["metadata"]["tokenizer.ggml.tokens"], "zqjx"]
    types = np.append(BPE["metadata"]["tokenizer.ggml.token_type"], 1).astype(np.int32)
    assert len(bpe(pre, tokens=tokens, token_type=types).encode("zqjx", add_special=False)) == count


def test_pre_tokenizers_differ() -> None:
    """The goldens tell at least this many pre-tokenizers apart, so a wrong expression cannot hide."""
    assert len(BPE["answers"]) >= 25


@pytest.mark.parametrize("data", [SPM, TIES], ids=["spm", "spm_ties"])
def test_sentencepiece_ids(data: dict) -> None:
    check(Tokenizer.from_gguf(data["metadata"]), data["texts"], data)


def test_byte_level_round_trip() -> None:
    tokenizer = bpe("qwen2")
    for text in BPE["texts"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_sentencepiece_round_trip() -> None:
    tokenizer = Tokenizer.from_gguf(SPM["metadata"])
    specials = ("\n\n", "    ", "<|user|>", "\u2581")  # a space follows user-defined tokens, as in llama.cpp
    for text in SPM["texts"]:
        if not any(special in text for special in specials):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_normalization() -> None:
    tokenizer = bpe("qwen2")
    for text in ("e\u0301", "\u212b", "\ufb01", "\u1e9b\u0323"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_properties() -> None:
    tokenizer = bpe()
    ids = {text: i for i, text in enumerate(BPE["metadata"]["tokenizer.ggml.tokens"])}
    assert tokenizer.vocab_size == len(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids["<s>"], ids["</s>"], None)
    assert tokenizer.chat_template is None
    assert tokenizer.is_control(ids["<|im_end|>"])  # although the file calls it normal
    assert not tokenizer.is_control(ids["<|user|>"])
    assert tokenizer.token_bytes(ids["<|im_end|>"]) == b"<|im_end|>"
    assert tokenizer.token_bytes(ids["Ġ"]) == b" "
    assert tokenizer.token_bytes(ids["Ã"]) == b"\xc3"
    spm = Tokenizer.from_gguf(SPM["metadata"])
    assert spm.token_bytes(3 + 0xE2) == b"\xe2"
    assert spm.decode([1, 3 + 0xE2, 3 + 0x82, 3 + 0xAC]) == "€"
    for bad in (-1, tokenizer.vocab_size):
        for call in (tokenizer.token_bytes, tokenizer.is_control, lambda i: tokenizer.decode([i])):
            with pytest.raises(ValueError, match=str(bad)):
                call(bad)


def test_bos_and_eos() -> None:
    bos, eos = bpe().bos_id, bpe().eos_id
    plain = bpe().encode("a", add_special=False)
    assert bpe().encode("a") == plain
    assert bpe("llama-bpe").encode("a") == [bos, *plain]
    assert bpe("llama-bpe", add_bos_token=False).encode("a") == plain
    assert bpe(add_bos_token=True, add_eos_token=True).encode("a") == [bos, *plain, eos]
    assert bpe(add_bos_token=True).encode("<s>a", parse_special=True) == [bos, bos, *plain]
    assert bpe(add_bos_token=True).encode("") == [bos]


def test_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="character 1 is an unpaired surrogate"):
        bpe().encode("a\ud800")


def test_special_tokens_swallow_spaces() -> None:
    keys = BPE["metadata"]
    ids = {text: i for i, text in enumerate(keys["tokenizer.ggml.tokens"])}
    phi = Tokenizer.from_gguf(keys | {"tokenizer.ggml.pre": "gpt-2", "general.name": "Phi-3 mini"})
    assert phi.encode("<|user|> \n\t<|im_end|> <s> ", parse_special=True) == [
        *(ids["<|user|>"], ids["<|im_end|>"], ids["<s>"], ids["Ġ"])
    ]
    jina = bpe("jina-v2-code")
    assert jina.encode(" \n<mask> ", parse_special=True) == [ids["<mask>"], ids["Ġ"]]


def test_end_tokens() -> None:
    def ends(*texts: str, **more: int) -> set[str]:
        tokens = [*map(str, range(300)), *texts]
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 0,
        }
        keys |= {f"tokenizer.ggml.{key}_token_id": 300 + at for key, at in more.items()}
        return {tokens[i] for i in Tokenizer.from_gguf(keys).eos_ids if i >= 300}

    assert ends("<|im_end|>", "<|im_start|>", "<|eot_id|>") == {"<|im_end|>", "<|eot_id|>"}
    assert ends("x", "y", "z", eot=0, eom=1, bos=2) == {"x", "y"}
    assert ends("<|fim_pad|>", "<|file_sep|>", "<|fim_prefix|>") == {"<|fim_pad|>", "<|file_sep|>"}
    assert ends("<|end|>", "<|return|>") == {"<|end|>", "<|return|>"}
    assert ends("<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}
    assert ends("</s>", "<|tool_response>") == {"<|tool_response>"}


# --- streaming ---


@pytest.mark.parametrize("data", [BPE, SPM, TIES], ids=["bpe", "spm", "spm_ties"])
def test_stream_equals_decode(data: dict) -> None:
    tokenizer = Tokenizer.from_gguf(data["metadata"])
    rng = random.Random(1)
    cases = [tokenizer.encode(text, parse_special=True) for text in data["texts"]]
    cases += [[rng.randrange(tokenizer.vocab_size) for _ in range(40)] for _ in range(50)]
    cases += [[rng.randrange(259) for _ in range(40)] for _ in range(50)]  # mostly bytes
    for ids in cases:
        for skip in (True, False):
            raw = [tokenizer.token_bytes(i) for i in ids if not (skip and tokenizer.is_control(i))]
            stream = TextStream(tokenizer, skip)
            text = "".join([stream.push(i) for i in ids]) + stream.flush()
            assert text == tokenizer.decode(ids, skip)
            assert text in (whole := b"".join(raw).decode("utf-8", "replace"), whole[1:], whole.replace(" ", "", 1))


def test_stream_holds_back_characters() -> None:
    tokenizer = Tokenizer.from_gguf(SPM["metadata"])
    stream = TextStream(tokenizer)
    byte = 3  # the id of byte 0
    assert [stream.push(byte + b) for b in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]
    assert stream.push(byte + 0xE2) == ""
    assert stream.push(2) == ""  # a control token adds nothing
    assert stream.push(byte + 0x41) == "\ufffdA"
    assert stream.push(byte + 0xFF) == "\ufffd"
    assert stream.push(byte + 0xF0) == ""
    assert stream.flush() == "\ufffd"


def test_control_tokens_have_text_where_it_is_asked_for() -> None:
    tokenizer = Tokenizer.from_gguf(SPM["metadata"])
    tokens = [1, *tokenizer.encode("ab", add_special=False), 1, 0, 2]
    for special, text in [((), "ab"), (False, "ab"), ([1], "<s>ab<s>"), (True, "<s>ab<s><unk>")]:
        watcher = Watcher(tokenizer, SamplingParams(special_tokens=special), [1])
        assert watcher.take(tokens, [])[0] + watcher.flush() == text and watcher.finish_reason == "stop"
    assert SamplingParams(special_tokens=[np.int64(1)]).special_tokens == (1,)


def test_first_space_is_dropped_once() -> None:
    tokenizer = Tokenizer.from_gguf(SPM["metadata"])
    stream = TextStream(tokenizer)
    space = tokenizer.encode(" ", add_special=False)  # two spaces, including the added one
    assert [tokenizer.token_bytes(i) for i in space] == [b"  "]
    assert [stream.push(i) for i in (1, *space, *space)] == ["", " ", "  "]
    assert Tokenizer.from_gguf(TIES["metadata"]).decode(TIES["plain"][1]) == TIES["texts"][1] == " "


@given(st.text("ab<|", max_size=30), st.lists(st.text("ab<|", min_size=1, max_size=5), max_size=3), st.randoms())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_stop_strings(text: str, stops: list[str], rng: random.Random) -> None:
    """Whatever the pieces, the result is the text before the first completed stop string, without any part of it."""
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    matcher, out, at = StopMatcher(stops), "", 0
    while at < len(text) and not matcher.stopped:
        size = rng.randint(1, 4)
        safe, stopped = matcher.push(text[at : at + size])
        out, at = out + safe, at + size
        assert stopped == matcher.stopped
        held = text[len(out) : at]
        assert stopped or not held or any(stop.startswith(held) for stop in stops)
        assert (text[: ends[0][1]] if ends else text).startswith(out)
    assert matcher.stopped == bool(ends)
    assert out + matcher.flush() == (text[: ends[0][1]] if ends else text)


def test_stop_matcher_after_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("abE") == ("ab", False)
    assert matcher.push("NDxyz") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


# --- files that are wrong ---


def _without(key: str) -> dict:
    return {name: value for name, value in BPE["metadata"].items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_key(key: str) -> None:
    with pytest.raises(ModelFileError, match=rf"^small\.gguf: tokenizer\.ggml\.{key}: "):
        Tokenizer.from_gguf(_without(key), "small.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("pre", 3),
        ("tokens", []),
        ("tokens", "abc"),
        ("tokens", np.arange(3)),
        ("tokens", ["a", "b", "a"]),
        ("token_type", np.ones(5, np.int32)),
        ("token_type", np.full(len(BPE["metadata"]["tokenizer.ggml.tokens"]), 7, np.int32)),
        ("token_type", np.full(len(BPE["metadata"]["tokenizer.ggml.tokens"]), -1, np.int32)),
        ("token_type", np.ones(len(BPE["metadata"]["tokenizer.ggml.tokens"]), np.float32)),
        ("merges", ["a b c"]),
        ("merges", ["ab"]),
        ("merges", ["a "]),
        ("merges", [" "]),
        ("merges", [""]),
        ("merges", ["a \u4e00"]),
        ("merges", np.zeros(3)),
        ("eos_token_id", -1),
        ("padding_token_id", "x"),
        ("unknown_token_id", True),
        ("add_bos_token", 1),
        ("add_eos_token", "yes"),
    ],
)
def test_bad_key(key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match=rf"^small\.gguf: tokenizer\.ggml\.{key}: "):
        Tokenizer.from_gguf(BPE["metadata"] | {f"tokenizer.ggml.{key}": value}, "small.gguf")


def test_bad_scores() -> None:
    scores = SPM["metadata"]["tokenizer.ggml.scores"].copy()
    scores[5] = np.nan
    for value in (scores, scores[:4], np.ones(len(scores), np.int32)):
        with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.scores: "):
            Tokenizer.from_gguf(SPM["metadata"] | {"tokenizer.ggml.scores": value})


def test_bad_template() -> None:
    with pytest.raises(ModelFileError, match="chat_template"):
        Tokenizer.from_gguf(BPE["metadata"] | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize("model", ["t5", "rwkv", "no_vocab", ""])
def test_other_models_are_named(model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"tokenizer\.ggml\.model = '{model}'"):
        Tokenizer.from_gguf(BPE["metadata"] | {"tokenizer.ggml.model": model})


def test_unknown_pre_tokenizer_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"pre = 'qwen9'.*known: .*llama-bpe.*qwen2"):
        bpe("qwen9")


def test_empty_token_and_repeated_merge() -> None:
    keys = BPE["metadata"]
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    more = {
        "tokenizer.ggml.tokens": [*tokens, ""],
        "tokenizer.ggml.token_type": np.append(keys["tokenizer.ggml.token_type"], np.int32(4)),
        "tokenizer.ggml.merges": [*merges, merges[0]],
    }
    assert Tokenizer.from_gguf(keys | more).encode("the text") == Tokenizer.from_gguf(keys).encode("the text")


# --- cost ---


@pytest.mark.parametrize("tokenizer", [bpe("qwen2"), bpe("deepseek-llm"), bpe("exaone-moe"), bpe("tiny_aya"),
                                       Tokenizer.from_gguf(SPM["metadata"])])  # fmt: skip
@pytest.mark.parametrize("unit", ["x", " ", "\n", "1", "!", "a ", "a\u0301", "the quick brown fox. ", "<|user|>"])
def test_time_grows_with_the_text(tokenizer: Tokenizer, unit: str) -> None:
    """100,000 characters take well under a second a piece; a quadratic method takes minutes."""
    start = time.perf_counter()
    ids = tokenizer.encode(unit * (100_000 // len(unit)))
    assert ids
    assert time.perf_counter() - start <= 5


def test_import_is_light() -> None:
    code = "import sys, ferrum_jax.tokenizer, ferrum_jax.chat; print({'tokenizers', 'jinja2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
