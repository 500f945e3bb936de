"""Vocabularies whose parts are missing, beyond the model, in other files, or of wrong kinds.

Ids of directories are those of transformers; of GGUF files they are llama.cpp's rules: an id beyond the vocabulary is
ignored with a warning, tokens without types are normal and without scores have 0.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as T
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

import ferrum_jax as fj
from ferrum_jax.convert import convert
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.tokenizer.opening import tokenizer_of_directory, tokenizer_of_gguf
from support.directories import LLAMA, edit, write
from support.goldens import tiny_encoders
from support.tiny_gguf import write_tiny_llama
from unit.text.test_directory_tokenizer import byte_level, directory, spm
from unit.text.test_tokenizer import BPE, SPM

PREFIX = "tokenizer.ggml."
IDS = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask", "eot", "eom", "fim_pad", "fim_sep")

# ---- GGUF


@pytest.mark.parametrize("name", IDS)
def test_an_id_beyond_the_vocabulary_counts_as_absent(name: str, tmp_path: Path) -> None:
    key = f"{PREFIX}{name}_token_id"
    read = ("bos", "eos", "unknown", "padding", "eot", "eom", "fim_pad", "fim_sep")
    without = {k: v for k, v in BPE["metadata"].items() if k != key} | {PREFIX + "pre": "gpt-2"}
    expected = Tokenizer.from_gguf(without)
    for value in (len(without[PREFIX + "tokens"]), 2**32 - 1, np.uint32(2**32 - 1)):
        if name in read:
            with pytest.warns(UserWarning, match=rf"small\.gguf: {key}: is \d+, outside the vocabulary .* is ignored"):
                made = Tokenizer.from_gguf(without | {key: value}, "small.gguf")
        else:
            made = Tokenizer.from_gguf(without | {key: value}, "small.gguf")
        for text in BPE["texts"]:
            assert made.encode(text) == expected.encode(text)
        assert (made.eos_ids, made.bos_id, made.pad_id) == (expected.eos_ids, expected.bos_id, expected.pad_id)


@pytest.mark.slow
def test_a_file_with_such_an_id_loads(tmp_path: Path) -> None:
    keys = {f"{PREFIX}{name}_token_id": (2**32 - 1, T.UINT32) for name in ("padding", "seperator", "eos")}
    with pytest.warns(UserWarning, match="is ignored"):
        model = fj.load(write_tiny_llama(tmp_path / "m.gguf", metadata=keys), dtype="float32")
    assert model.tokenizer.pad_id is None and model.tokenizer.eos_ids == {0, 2, 11}  # two by their texts, 11 as in llama.cpp
    assert len(model.generate(["the"], fj.SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_tokens_without_types_and_scores() -> None:
    keys = {k: v for k, v in SPM["metadata"].items() if k not in (PREFIX + "token_type", PREFIX + "scores")}
    count = len(keys[PREFIX + "tokens"])
    stated = {PREFIX + "token_type": np.ones(count, np.int32), PREFIX + "scores": np.zeros(count, np.float32)}
    made, expected = Tokenizer.from_gguf(keys), Tokenizer.from_gguf(keys | stated)
    for text in SPM["texts"]:
        assert made.encode(text) == expected.encode(text)
        assert made.decode(made.encode(text)) == expected.decode(made.encode(text))
    assert made.eos_ids == expected.eos_ids
    bare = {k: v for k, v in BPE["metadata"].items() if k != PREFIX + "token_type"} | {PREFIX + "pre": "gpt-2"}
    assert Tokenizer.from_gguf(bare).decode(Tokenizer.from_gguf(bare).encode("the text")) == "the text"


@pytest.mark.parametrize("text", ["<0xZZ>", "<0x4>", "byte", "<0x 1>", "<0x+1>", "<0x041>", "0x41", ""])
def test_a_byte_that_is_none_is_an_error(text: str) -> None:
    keys = copy.copy(SPM["metadata"])
    keys[PREFIX + "tokens"] = [text if i == 3 + 0x41 else token for i, token in enumerate(keys[PREFIX + "tokens"])]
    with pytest.raises(
        fj.ModelFileError, match=rf"m\.gguf: tokenizer\.ggml\.tokens: token {3 + 0x41}, .* is a byte by its type"
    ):
        Tokenizer.from_gguf(keys, "m.gguf")


WRONG = (3, -1, 1.5, True, "x", "", ["x"], [], np.array([1, 2]), np.array([1.5]), np.array([True]), np.zeros(0, np.int32))


@pytest.mark.parametrize("model", ["gpt2", "llama", "bert"])
def test_keys_of_wrong_kinds(model: str) -> None:
    """Whatever a key holds, reading ends with a tokenizer or with a ModelFileError."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁the"]
    keys = {"gpt2": BPE["metadata"] | {PREFIX + "pre": "gpt-2"}, "llama": SPM["metadata"]}.get(
        model, {PREFIX + "tokens": words}
    )
    keys = keys | {PREFIX + "model": model, "tokenizer.chat_template": "x", "tokenizer.chat_template.a": "x"}
    keys |= {PREFIX + key: 3 for key in ("model", "tokens", "merges", "scores", "token_type") if PREFIX + key not in keys}
    names = {*keys, *(f"{PREFIX}{name}_token_id" for name in IDS), *(f"{PREFIX}add_{n}" for n in ("bos_token", "space_prefix"))}
    refused = 0
    for name in names:
        for value in WRONG:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *args, **kwargs: None)
                    tokenizer_of_gguf(keys | {name: value}, "m.gguf").encode("the")
            except fj.ModelFileError as error:
                assert str(error).startswith("m.gguf: ")
                refused += 1
    assert refused > 5 * len(WRONG)


# ---- directories


def entry(text: str, **more: object) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": text, **flags, "special": True, **more}


ELSEWHERE: dict[str, dict[str, Any]] = {
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {"264": entry("<x>"), "265": entry("<y>", special=False)}}},
    "with gaps": {"tokenizer_config": {"added_tokens_decoder": {"1000": entry("<x>"), "300": entry("<y>", special=False)}}},
    "stripping": {"tokenizer_config": {"added_tokens_decoder": {"264": entry("<x>", rstrip=True, lstrip=True)}}},
    "in the vocabulary": {"tokenizer_config": {"added_tokens_decoder": {"257": entry("the"), "264": entry("<x>")}}},
    "made special": {"tokenizer_config": {"added_tokens_decoder": {"263": entry("<think>")}}},
    "added_tokens.json": {"added_tokens": {"<x>": 264, "<y>": 265}},
    "both": {"tokenizer_config": {"added_tokens_decoder": {"264": entry("<x>")}}, "added_tokens": {"<y>": 264}},
}


@pytest.mark.parametrize("files", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("kind", [byte_level, spm, lambda: spm(unigram=True)], ids=["bytes", "spm", "unigram"])
def test_tokens_that_stand_elsewhere(kind, files: dict[str, Any], tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.get("tokenizer_config", {})
    path = directory(tmp_path, kind(), **(files | {"tokenizer_config": config}))
    ours, theirs = tokenizer_of_directory(path), AutoTokenizer.from_pretrained(path)
    for text in ("the <x> cat<y><think>", "<x>", "<y>the"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    "value", [[], 3, {"x": entry("a")}, {"1": "a"}, {"1": {"content": 3}}, {"-1": entry("a")}, {"9" * 20: entry("a")}]
)
def test_tokens_elsewhere_of_a_wrong_kind(value: object, tmp_path: Path) -> None:
    path = directory(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": value})
    with pytest.raises(fj.ModelFileError, match=r"tokenizer_config\.json: key added_tokens_decoder: must give tokens"):
        tokenizer_of_directory(path)


@pytest.mark.slow
def test_more_tokens_than_rows(tmp_path: Path) -> None:
    path = write(LLAMA, tmp_path / "model")
    before = fj.load(path, dtype="float32")
    rows = before.config.vocab_size
    count = before.tokenizer.vocab_size
    more = [{"id": count + i, **entry(f"<more{i}>", special=i % 2 == 0)} for i in range(rows - count + 3)]
    edit(path / "tokenizer.json", lambda content: content["added_tokens"].extend(more))
    edit(path / "tokenizer_config.json", lambda content: content.update(pad_token=more[-1]["content"]))
    model = fj.load(path, dtype="float32")
    assert model.tokenizer.vocab_size == rows + 3 and model.tokenizer.pad_id == rows + 2
    assert model.tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(path))
    params = fj.SamplingParams(max_tokens=8, temperature=5.0, seed=1, ignore_eos=True)
    [done] = model.generate(["the"], params)
    assert max(done.token_ids) < rows
    for call in (model.generate, lambda texts: list(model.stream(texts[0])), lambda texts: model.perplexity([rows, 1])):
        with pytest.raises(ValueError, match=rf"token id {rows}\d? is out of range: the vocabulary has {rows} ids"):
            call([f"the{more[-3]['content']}"])
    written = gguf.GGUFReader(convert(path, tmp_path / "m.gguf", to="gguf")).fields
    assert len(written[PREFIX + "tokens"].contents()) == rows and PREFIX + "padding_token_id" not in written
    assert fj.load(tmp_path / "m.gguf", dtype="float32").generate(["the"], params)[0].token_ids == done.token_ids


# ---- sentence-transformers


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
def test_do_lower_case(kind: str, tmp_path: Path) -> None:
    """sentence-transformers puts texts into lower case before a tokenizer, a cased one too, sees them."""
    if kind == "vocab.txt":
        (tmp_path / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cat", "CAT"])
        )
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    else:
        library = byte_level()
        library.add_tokens([AddedToken("CAT", normalized=False)])
        directory(tmp_path, library)
    cased = tokenizer_of_directory(tmp_path)
    path = tmp_path / "sentence_bert_config.json"
    for value, lower in ((True, True), (False, False), (None, False)):
        path.write_text(json.dumps({"max_seq_length": 8, "do_lower_case": value}))
        made = tokenizer_of_directory(tmp_path)
        assert made.encode("The CAT") == cased.encode("the cat" if lower else "The CAT")
        assert made.encode_batch(["The CAT"]) == [made.encode("The CAT")]
    path.write_text('{"do_lower_case": "yes"}')
    with pytest.raises(fj.ModelFileError, match=r"sentence_bert_config\.json: key do_lower_case: must be true or false"):
        tokenizer_of_directory(tmp_path)


def test_embeddings_of_lower_case_and_of_tokens_beyond_the_rows(tmp_path: Path) -> None:
    tiny_encoders.write_directory(tiny_encoders.CASES[2], tmp_path)
    path, texts = tmp_path / "sentence_bert_config.json", ["Iron AND Rust"]
    plain = fj.load(tmp_path)
    path.write_text(json.dumps({"do_lower_case": True, "max_seq_length": 32}))
    model = fj.load(tmp_path)
    assert np.array_equal(model.embed(texts), plain.embed(["iron and rust"]))
    assert not np.array_equal(model.embed(texts), plain.embed(texts))
    rows = model.config.vocab_size
    edit(tmp_path / "tokenizer.json", lambda content: content["added_tokens"].append({"id": rows, **entry("<x>")}))
    model = fj.load(tmp_path)
    assert model.tokenizer.vocab_size == rows + 1
    with pytest.raises(ValueError, match=f"text 1 has the token {rows}, but the embedding has {rows} rows"):
        model.embed(["iron", "<x>"])


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_flags_of_a_bert_vocabulary_are_those_of_tokenizer_config(lowercase: bool, tmp_path: Path) -> None:
    """As in transformers: they take precedence over the normalizer of tokenizer.json, and have defaults if absent."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cafe", "Café", "café", "中", "中文"]
    library = Library(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    directory(tmp_path, library)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    texts, seen = ["The Caf\u00e9", "caf\u00e9", "\u4e2d\u6587"], set()
    for config in (
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": not lowercase},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | config))
        found = tokenizer_of_directory(tmp_path).encode_batch(texts)
        assert found == AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
        seen.add(str(found))
    assert len(seen) >= 3
