"""The text of a continuation: together with the prompt's text it is the decoding of all ids, wherever the cut is.

All ids are decoded by the `tokenizers` library, or for a GGUF vocabulary by `Tokenizer.decode`, which other tests compare with
llama.cpp.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFValueType as T
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

import ferrum_jax as fj
from ferrum_jax.tokenizer import TextStream, Tokenizer
from ferrum_jax.tokenizer.opening import tokenizer_of_directory
from support.tiny_gguf import write_tiny_llama
from unit.text.test_directory_tokenizer import KINDS, directory, spm
from unit.text.test_tokenizer import BPE, SPM, TIES

TEXTS = ["the cat", " the  cat\n", "Straße 東京 🧪 the", "<s>the</s> the", "  the", "é", "<x>a <x> the<y>▁▁t <y>"]


def gemma() -> Library:
    """Spaces are ▁, and none is put before a text."""
    made = spm()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def added(made: Library) -> Library:
    """With added tokens: one that is found in the normalized text, and one of spaces."""
    made.add_tokens(
        [AddedToken("<x>", normalized=True), AddedToken("▁▁", normalized=False), AddedToken("<y>", normalized=False)]
    )
    return made


def metaspace(scheme: str) -> Library:
    made = spm(metaspace=True)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return made


def wordpiece() -> Library:
    made = Library(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "a": 4}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens(["[UNK]"])
    return made


ALL = KINDS | {"gemma": gemma, "wordpiece": wordpiece}
ALL |= {
    "spm added": lambda: added(spm()),
    "gemma added": lambda: added(gemma()),
    "bytes added": lambda: added(KINDS["bytes"]()),
}
ALL |= {scheme: lambda scheme=scheme: metaspace(scheme) for scheme in ("first", "always", "never")}


def cuts(tokenizer: Tokenizer, ids: list[int]) -> Iterator[tuple[str, str]]:
    """(text of a prompt as far as it is known, text of its continuation) for every cut."""
    for cut in range(len(ids) + 1):
        prompt, rest = TextStream(tokenizer), TextStream(tokenizer, before=ids[:cut])
        before = "".join([prompt.push(token) for token in ids[:cut]])
        yield before, "".join([rest.push(token) for token in ids[cut:]]) + rest.flush()


@pytest.mark.parametrize("kind", ALL)
def test_of_a_directory(kind: str, tmp_path: Path) -> None:
    library = ALL[kind]()
    tokenizer = tokenizer_of_directory(directory(tmp_path, library))
    for text in TEXTS:
        ids = library.encode(text).ids
        whole = library.decode(ids, skip_special_tokens=True)
        assert {before + rest for before, rest in cuts(tokenizer, ids)} == {whole}, text


@pytest.mark.parametrize("data", [BPE, SPM, TIES], ids=["bpe", "spm", "spm_ties"])
def test_of_a_gguf_file(data: dict) -> None:
    tokenizer = Tokenizer.from_gguf(data["metadata"])
    rng = random.Random(2)
    cases = [tokenizer.encode(text, parse_special=True) for text in data["texts"]]
    cases += [[rng.randrange(size) for _ in range(12)] for size in (tokenizer.vocab_size, 259) for _ in range(40)]
    for ids in cases:
        assert {before + rest for before, rest in cuts(tokenizer, ids)} == {tokenizer.decode(ids)}


def test_a_prompt_without_text_leaves_the_first_space_out(tmp_path: Path) -> None:
    """As transformers' pipeline: the decoding of the whole without what decoding makes of the prompt."""
    library = spm()
    tokenizer, the = tokenizer_of_directory(directory(tmp_path, library)), library.token_to_id("▁the")
    for before in ([], [1], [1, 2], [the], [1, the], [the, 2], [3 + 0x20], [3 + 0xC3]):
        whole, prompt = (library.decode(ids, skip_special_tokens=True) for ids in ([*before, the], before))
        expected = "\ufffd the" if "\ufffd" in whole else whole[len(prompt) :]
        assert TextStream(tokenizer, before=before).push(the) == expected
    assert TextStream(tokenizer, before=[tokenizer.vocab_size]).push(the) == "the"  # an id of padding has no text


def test_a_character_that_the_prompt_began_comes_whole() -> None:
    tokenizer = Tokenizer.from_gguf(SPM["metadata"])
    byte = [3 + b for b in "🧪".encode()]
    for cut in range(4):
        stream = TextStream(tokenizer, before=[1, *byte[:cut], 1])
        assert "".join([stream.push(token) for token in byte[cut:]]) == "🧪"
    assert TextStream(tokenizer, before=byte).push(3 + ord("a")) == "a"
    assert TextStream(tokenizer, before=byte[:2]).push(3 + ord("a")) == "�a"


WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"ehlot", "▁t", "▁th", "▁the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> fj.Model:
    metadata = {
        "model": ("llama", T.STRING),
        "tokens": (WORDS, T.ARRAY),
        "token_type": ([2, 3, 3, *[6] * 256, *[1] * (len(WORDS) - 259)], T.ARRAY),
        "scores": ([float(len(word)) for word in WORDS], T.ARRAY),
        **{"bos_token_id": (1, T.UINT32), "eos_token_id": (2, T.UINT32)},
        **dict.fromkeys(("pre", "merges", "padding_token_id")),
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | {"llama.vocab_size": len(WORDS)}
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return fj.load(write_tiny_llama(path, vocab=len(WORDS), metadata=keys), dtype="float32")


@pytest.mark.slow
def test_every_way_of_generating(model: fj.Model, tmp_path: Path) -> None:
    tokenizer, the = model.tokenizer, WORDS.index("▁the")

    def params(**more: object) -> fj.SamplingParams:
        return fj.SamplingParams(**{"max_tokens": 2, "temperature": 0, "logit_bias": {the: 500.0}, **more})

    prompts = [tokenizer.encode(text) for text in ("hello", " hello", "é")] + [tokenizer.encode("é")[:-1], [1]]
    for prompt, done in zip(prompts, model.generate(prompts, params()), strict=True):
        known = "".join(map(TextStream(tokenizer).push, prompt))
        assert known + done.text == tokenizer.decode([*prompt, *done.token_ids])
        assert "".join(piece for piece, _ in model.stream(prompt, params())) == done.text
    plain = model.generate(prompts, fj.SamplingParams(max_tokens=3, temperature=0))
    stopped = model.generate(prompts, fj.SamplingParams(max_tokens=3, temperature=0, stop=("never",)))
    assert [c.text for c in plain] == [c.text for c in stopped]
    assert [c.token_ids for c in model.generate(["hello"], params(stop=(" the",)))] == [[the]]
    with fj.Engine(model, fj.EngineConfig(max_seqs=2)) as engine:
        request = engine.submit("hello", params(max_tokens=40))
        next(iter(request))
        engine.snapshot(request, tmp_path / "snapshot")
        fork = request.fork(params())
        assert fork.result().text == " the the"
        assert engine.restore(tmp_path / "snapshot").result().text == request.result().text == 40 * " the"
