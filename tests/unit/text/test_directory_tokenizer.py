"""tokenizer.json with the `Tokenizer` interface: the ids are the library's, everything else is as with a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import ferrum_jax as fj
from ferrum_jax.tokenizer import TextStream
from ferrum_jax.tokenizer.bpe import byte_letters
from ferrum_jax.tokenizer.opening import tokenizer_of_directory

TEXTS = ["the cat", " the  cat\n", "Straße 東京 🧪", "", "a", "the<|im_end|>cat<think>the", "  "]


def byte_level() -> tokenizers.Tokenizer:
    tokens = [*byte_letters(), "th", "the", "Ġt", "Ġthe"]
    made = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "he")][:3])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def spm(unigram: bool = False, metaspace: bool = False) -> tokenizers.Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehtn", "▁t", "▁th", "▁the", "▁c"]
    if unigram:
        model = models.Unigram([(t, -float(i)) for i, t in enumerate(tokens)], 0, byte_fallback=True)
    else:
        merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c")]
        model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return made


def words() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "cat": 3, "a": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


KINDS = {
    "bytes": byte_level,
    "spm": spm,
    "metaspace": lambda: spm(metaspace=True),
    "unigram": lambda: spm(unigram=True),
    "words": words,
}


def directory(path: Path, library: tokenizers.Tokenizer, **files: object) -> Path:
    """tokenizer.json and further files, `tokenizer_config={...}`."""
    library.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(kind: str, tmp_path: Path) -> None:
    library = KINDS[kind]()
    ours = tokenizer_of_directory(directory(tmp_path, library))
    assert ours.vocab_size == library.get_vocab_size()
    for text in TEXTS:
        for add_special in (False, True):
            expected = library.encode(text, add_special_tokens=add_special).ids
            ids = ours.encode(text, add_special, parse_special=True)
            assert ids == expected, text
            assert ours.decode(ids) == library.decode(expected, skip_special_tokens=True)
            stream = TextStream(ours)
            assert "".join([stream.push(i) for i in ids]) + stream.flush() == ours.decode(ids)
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("\ud800")
    for bad in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            ours.token_bytes(bad)


def test_special_tokens_are_read_only_where_asked(tmp_path: Path) -> None:
    ours = tokenizer_of_directory(directory(tmp_path, byte_level()))
    end, think = 262, 263
    assert ours.encode("the<|im_end|><think>", parse_special=True) == [257, end, think]
    plain = ours.encode("the<|im_end|><think>")
    assert end not in plain and plain[-1] == think and ours.decode(plain) == "the<|im_end|><think>"
    assert ours.decode([257, end], skip_special=False) == "the<|im_end|>" and ours.decode([257, end]) == "the"
    assert [ours.token_bytes(i) for i in (0xE9, 257, end, think)] == [b"\xe9", b"the", b"<|im_end|>", b"<think>"]
    assert (ours.is_control(end), ours.is_control(think), ours.is_control(257)) == (True, False, False)
    assert ours.eos_ids == {260, 262}  # known by their text


def test_bytes_of_sentencepiece_tokens(tmp_path: Path) -> None:
    ours = tokenizer_of_directory(directory(tmp_path, spm()))
    ids = {text: i for text, i in spm().get_vocab().items()}
    pieces = [ours.token_bytes(ids[text]) for text in ("▁the", "<0xE6>", "a", "</s>")]
    assert pieces == [b" the", b"\xe6", b"a", b"</s>"]
    assert ours.adds_space_prefix and ours.eos_ids == {2}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [270]),
        ({"add_bos_token": False}, [270]),
        ({"add_bos_token": True}, [1, 270]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 270, 2]),
        ({"add_eos_token": True}, [270, 2]),
    ],
    ids=str,
)
def test_flags_of_the_config_count_where_the_file_has_no_template(flags: dict, expected: list[int], tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    path = directory(tmp_path, spm(), tokenizer_config=names | flags)
    assert tokenizer_of_directory(path).encode("the") == [1, 270]
    content = json.loads((path / "tokenizer.json").read_text()) | {"post_processor": None}
    (path / "tokenizer.json").write_text(json.dumps(content))
    ours = tokenizer_of_directory(path)
    assert ours.encode("the") == expected and ours.encode("the", add_special=False) == [270]


def test_ends_of_all_files_count(tmp_path: Path) -> None:
    files = {
        "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "generation_config": {"eos_token_id": [256, 262, 10**6]},
        "config": {"eos_token_id": 257, "bos_token_id": 260},
    }
    ours = tokenizer_of_directory(directory(tmp_path, byte_level(), **files))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 262, 260)
    assert ours.eos_ids == {256, 257, 260, 262}


def test_chat_template(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for value, expected in (("text", "text"), (named, "plain"), (None, None)):
        path = directory(tmp_path, byte_level(), tokenizer_config={"chat_template": value})
        assert tokenizer_of_directory(path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert tokenizer_of_directory(tmp_path).chat_template == "file"


def test_truncation_and_padding_of_the_file_are_not_ours(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=20)
    ours = tokenizer_of_directory(directory(tmp_path, library))
    assert len(ours.encode("abcdefg")) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["model"].pop("vocab"), r"key model\.vocab: is missing"),
        (lambda c: c["model"]["vocab"].update(a="x"), "token 'a' has the id 'x'"),
        (lambda c: c["model"]["vocab"].update(zz=10**9), "token 'zz' has the id 1000000000"),
        (lambda c: c["model"]["vocab"].update(zz=5), "the id 5 is both"),
        (lambda c: c["added_tokens"].append(7), "key added_tokens"),
        (lambda c: c["model"]["merges"].append(["q", "nobody"]), "cannot be used"),
        (lambda c: c["model"].update(type="Other"), "cannot be used"),
        (
            lambda c: c.update(decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": False}),
            "CTC is not",
        ),
    ],
)
def test_what_cannot_be_is_named(change, said: str, tmp_path: Path) -> None:
    path = directory(tmp_path, byte_level()) / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(fj.ModelFileError, match=rf"tokenizer\.json: .*{said}"):
        tokenizer_of_directory(tmp_path)
