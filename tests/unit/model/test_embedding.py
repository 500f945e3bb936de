"""Embedding models of the BERT family, directories and GGUF files, against transformers in float32.

The numbers in tests/goldens/encoders were made by transformers from the same directories, one text at a time (see
tests/goldens/scripts); a GGUF file of the same weights and vocabulary must give the same.
"""

from __future__ import annotations

import dataclasses
import io
import json
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.cli import main
from ferrum_jax.convert import convert
from ferrum_jax.loading import validate
from ferrum_jax.models.bert import embed
from ferrum_jax.weights.opening import open_model
from support.directories import LLAMA, edit, edit_tensors
from support.directories import write as write_decoder
from support.goldens import tiny_encoders

TEXTS, CASES = tiny_encoders.TEXTS, tiny_encoders.CASES
MEAN, CLS, CASED = CASES
BOUND = 1e-5


@pytest.fixture(scope="module", params=[(case, kind) for kind in ("directory", "gguf") for case in CASES],
                ids=lambda param: f"{param[0].name}-{param[1]}")  # fmt: skip
def loaded(request, tmp_path_factory):
    """(model, golden arrays) of one case."""
    spec, kind = request.param
    with np.load(tiny_encoders.HERE / f"{spec.name}.npz") as file:
        golden = dict(file)
    path = tmp_path_factory.mktemp("encoder")
    digest = tiny_encoders.write_directory(spec, path / "model")
    assert digest == str(golden["digest"]), "not the files that the goldens were made from"
    if kind == "directory":
        return fj.load(path / "model"), golden
    return fj.load(tiny_encoders.write_gguf(spec, path / "model.gguf"), max_seq_len=spec.text_length or None), golden


@pytest.fixture(scope="module")
def mean(tmp_path_factory) -> fj.EmbeddingModel:
    path = tmp_path_factory.mktemp("encoder")
    tiny_encoders.write_directory(MEAN, path)
    return fj.load(path)


def quiet(model, texts: list[str], **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.embed(texts, **options)


# ---- numbers


def test_embeddings(loaded) -> None:
    model, golden = loaded
    assert isinstance(model, fj.EmbeddingModel) and model.config.dtype == "float32"
    vectors = quiet(model, TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == golden["vectors"].shape
    assert np.abs(vectors - golden["vectors"]).max() <= BOUND


def test_ids(loaded) -> None:
    model, golden = loaded
    for i, text in enumerate(TEXTS):
        ids, expected = model.tokenizer.encode(text, parse_special=True), golden[f"ids{i}"].tolist()
        kept = min(len(ids), model.max_seq_len) - 1
        assert [*ids[:kept], ids[-1]] == expected, text


def test_rows_do_not_depend_on_each_other(mean) -> None:
    """A text alone, with others, in another order and in another batch size: equal within float32's rounding."""
    texts = [*TEXTS, *(" ".join(["iron", "ore"] * (i % 9)) for i in range(150))]
    together, reversed_ = quiet(mean, texts), quiet(mean, texts[::-1])[::-1]
    alone = np.concatenate([quiet(mean, [text]) for text in texts[:24]])
    assert np.abs(together - reversed_).max() <= 2e-6
    assert np.abs(together[:24] - alone).max() <= 2e-6


def test_few_programs(mean) -> None:
    """Texts of all lengths, twice: programs go with buckets, not with texts."""
    texts = [" ".join(["ore"] * (i % 60)) for i in range(200)]
    quiet(mean, texts)
    before = mean.programs.compiled
    quiet(mean, texts[::-1])
    assert mean.programs.compiled == before <= 40


def test_what_lies_behind_a_row_is_not_seen(mean) -> None:
    tokens = np.array([[2, 5, 6, 3, 0, 0, 0, 0], [2, 7, 8, 9, 10, 11, 12, 3]], np.int32)
    lengths = np.array([4, 8], np.int32)
    plain = embed(mean.params, tokens, lengths, config=mean.config, normalize=False)
    tokens[0, 4:] = 9
    assert np.array_equal(plain, embed(mean.params, tokens, lengths, config=mean.config, normalize=False))


def test_length_of_vectors(mean) -> None:
    unit, plain = quiet(mean, TEXTS), quiet(mean, TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(unit, axis=1) - 1).max() <= 1e-6
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1 and np.abs(plain / lengths - unit).max() <= 1e-6


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "F16"])
def test_quantized_file_stays_compressed(format: str, tmp_path: Path) -> None:
    """Against the same values in F32."""
    model = fj.load(tiny_encoders.write_gguf(MEAN, tmp_path / "a.gguf", format))
    plain = fj.load(tiny_encoders.write_gguf(MEAN, tmp_path / "b.gguf", format, dequantized=True))
    sizes, whole = model.memory()["parameters"], plain.memory()["parameters"]
    assert sizes[format] < 0.6 * whole["F32"] and set(whole) == {"F32"}
    assert np.abs(quiet(model, TEXTS) - quiet(plain, TEXTS)).max() <= BOUND


def test_quantized_while_loading(tmp_path: Path) -> None:
    tiny_encoders.write_directory(MEAN, tmp_path / "model")
    model = fj.load(tmp_path / "model", quantize="q8_0")
    places = model.params["positions"].format, model.params["types"].format, model.params["embedding"].format
    assert places == ("F32", "F32", "Q8_0")
    with np.load(tiny_encoders.HERE / f"{MEAN.name}.npz") as file:
        cosines = (quiet(model, TEXTS) * file["vectors"]).sum(axis=1)
    assert cosines.min() >= 0.999


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_other_arithmetic(dtype: str, tmp_path: Path) -> None:
    model = fj.load(tiny_encoders.write_gguf(MEAN, tmp_path / "a.gguf", "Q8_0"), dtype=dtype)
    with np.load(tiny_encoders.HERE / f"{MEAN.name}.npz") as file:
        cosines = (quiet(model, TEXTS) * file["vectors"]).sum(axis=1)
    assert cosines.min() >= 0.999


# ---- as a user


def test_long_texts_are_cut_with_a_warning(mean) -> None:
    long = "ore " * 200
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 64 tokens"):
        vectors = mean.embed([long, "ore"])
    assert np.abs(vectors[0] - mean.embed(["ore " * 62])[0]).max() <= 2e-6


def test_no_texts(mean) -> None:
    assert mean.embed([]).shape == (0, MEAN.hidden) and mean.embed([]).dtype == np.float32


@pytest.mark.parametrize("texts", ["iron", b"iron", [b"iron"], [1, 2], [["iron"]], ["half \ud800 a pair"]])
def test_what_is_no_list_of_texts(mean, texts) -> None:
    with pytest.raises(ValueError):
        mean.embed(texts)


def test_what_an_encoder_does_not_do(mean, tmp_path: Path) -> None:
    for verb in ("generate", "stream", "chat", "render_chat", "logits", "perplexity"):
        with pytest.raises(fj.UnsupportedModelError, match="embedding model"):
            getattr(mean, verb)(["iron"])
    with pytest.raises(fj.UnsupportedModelError, match="embedding model"):
        fj.Engine(mean)
    path = tiny_encoders.write_gguf(MEAN, tmp_path / "a.gguf")
    for to in ("orbax", "gguf"):
        with pytest.raises(fj.UnsupportedModelError, match="embedding model"):
            convert(path, tmp_path / to, to=to)
    assert {file.name for file in tmp_path.iterdir()} == {"a.gguf"}


def test_memory_and_limits(mean, tmp_path: Path) -> None:
    assert mean.memory()["parameters_total"] == sum(mean.memory()["parameters"].values())
    path = tiny_encoders.write_gguf(MEAN, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="65 is beyond the model's 64 positions"):
        fj.load(path, max_seq_len=65)
    assert fj.load(path, max_seq_len=8).max_seq_len == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokenizers_agree(case, tmp_path: Path) -> None:
    """That of the directory and that of the GGUF file: ids, texts, control tokens."""
    tiny_encoders.write_directory(case, tmp_path / "model")
    with open_model(tmp_path / "model") as a, open_model(tiny_encoders.write_gguf(case, tmp_path / "a.gguf")) as b:
        ours, theirs = a.tokenizer(), b.tokenizer()
    assert ours.vocab_size == theirs.vocab_size == len(tiny_encoders.vocabulary(case))
    for text in TEXTS:
        for flags in ((True, True), (True, False), (False, True), (False, False)):
            ids = ours.encode(text, *flags)
            assert ids == theirs.encode(text, *flags)
        assert ours.decode(ids) == theirs.decode(ids)
    assert (
        ours.decode(ours.encode("iron unknow ores")) == theirs.decode(theirs.encode("iron unknow ores")) == "iron unknow ores"
    )
    controls = [i for i in range(ours.vocab_size) if theirs.is_control(i)]
    assert controls == [i for i in range(ours.vocab_size) if ours.is_control(i)] == [0, 1, 2, 3, 4]


# ---- bad input


def set_json(name: str, **content):
    return lambda path: edit(path / name, lambda old: old.update(content))


def change_tensors(change):
    return lambda path: edit_tensors(path / "model.safetensors", change)


def rename(old: str, new: str):
    return change_tensors(lambda entries: entries.__setitem__(new, entries.pop(old)))


QUERY = "encoder.layer.1.attention.self.query"
DAMAGES = {
    "tanh": (set_json("config.json", hidden_act="gelu_new"), "key hidden_act: 'gelu_new'"),
    "relative": (set_json("config.json", position_embedding_type="relative_key"), "key position_embedding_type"),
    "causal": (set_json("config.json", is_decoder=True), "key is_decoder"),
    "other attention": (set_json("config.json", add_cross_attention=True), "key add_cross_attention: True is not supported"),
    "heads": (set_json("config.json", num_attention_heads=5), "key hidden_size: is 64, not a multiple of 5"),
    "positions": (set_json("config.json", max_position_embeddings=65), "position_embeddings.weight: shape"),
    "max pooling": (
        set_json("1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True),
        "key pooling_mode: max_tokens is",
    ),
    "two poolings": (
        set_json("1_Pooling/config.json", pooling_mode_max_tokens=True),
        "key pooling_mode: max_tokens and mean_tokens",
    ),
    "no pooling": (lambda path: (path / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json, which says how"),
    "pooling elsewhere": (
        lambda path: edit(path / "modules.json", lambda old: old[1].update(path="..")),
        "../config.json, which says how",
    ),
    "dense": (
        lambda path: edit(path / "modules.json", lambda old: old.append({"type": "sentence_transformers.models.Dense"})),
        "a module Dense",
    ),
    "modules": (lambda path: (path / "modules.json").write_text("{}"), "must be a JSON array"),
    "length": (lambda path: (path / "sentence_bert_config.json").write_text('{"max_seq_length": 0}'), "key max_seq_length"),
    "positions of a buffer": (
        change_tensors(
            lambda entries: entries.__setitem__("embeddings.position_ids", ("I64", (1, 2), bytes(8) + b"\x02" + bytes(7)))
        ),
        "embeddings.position_ids: is not 0, 1, 2, ...: other",
    ),
    "no weight": (change_tensors(lambda entries: entries.pop(f"{QUERY}.weight")), f"tensor {QUERY}.weight: is missing"),
    "no bias": (change_tensors(lambda entries: entries.pop(f"{QUERY}.bias")), f"tensor {QUERY}.bias: is missing"),
    "unknown tensor": (rename(f"{QUERY}.bias", "cls.bias"), "tensor cls.bias: is unknown in a BertModel"),
    "decoder's tensor": (rename(f"{QUERY}.bias", "model.norm.bias"), "tensor model.norm.bias: is unknown"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "small vocabulary": (
        change_tensors(
            lambda entries: entries.__setitem__("embeddings.word_embeddings.weight", ("BF16", (3, 64), bytes(3 * 64 * 2)))
        ),
        "word_embeddings.weight: shape",
    ),
}


def test_keys_that_the_class_does_not_have(tmp_path: Path) -> None:
    tiny_encoders.write_directory(CASED, tmp_path)
    with open_model(tmp_path) as source:
        plain = source.encoder()
    set_json("config.json", extra_norm=True, rope_theta=10000.0, use_cache=True)(tmp_path)
    with open_model(tmp_path) as source:
        assert source.encoder() == plain


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    tiny_encoders.write_directory(CASED, tmp_path)
    validate(tmp_path)
    change(tmp_path)
    with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=message.replace("(", r"\(")):
        validate(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bert.pooling_type", 3, "pooling_type: 3 is not supported"),
        ("bert.attention.causal", True, "key bert.attention.causal"),
        ("bert.attention.head_count_kv", 2, "attention.head_count_kv"),
        ("bert.block_count", None, "key bert.block_count: is missing"),
        ("bert.block_count", 2, "has only 2 layers"),
        ("bert.block_count", 4, "blk.3.attn_q.weight: is missing"),
        ("bert.context_length", 63, "position_embd.weight: shape"),
        ("bert.rope.freq_base", 10000.0, "key bert.rope.freq_base"),
        ("tokenizer.ggml.tokens", ["a"], "does not have the token '\\[UNK\\]'"),
        ("tokenizer.ggml.tokens", ["a", "a"], "is both token 0 and token 1"),
    ],
)
def test_damaged_gguf(key: str, value, message: str, tmp_path: Path) -> None:
    ids = ("unknown", "cls", "seperator", "padding", "mask") if key.endswith("tokens") else ()
    metadata = {key: value} | {f"tokenizer.ggml.{name}_token_id": None for name in ids}
    path = tiny_encoders.write_gguf(MEAN, tmp_path / "a.gguf", metadata=metadata)
    with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=message):
        validate(path)


def test_pooling_of_a_gguf_without_the_key_is_the_mean(tmp_path: Path) -> None:
    path = tiny_encoders.write_gguf(CLS, tmp_path / "a.gguf", metadata={"bert.pooling_type": None})
    assert fj.load(path).config == dataclasses.replace(fj.load(tiny_encoders.write_gguf(CLS, path)).config, pooling="mean")


@pytest.mark.parametrize(("mode", "expected"), [("mean", "mean"), ("cls", "cls")])
def test_newer_spelling_of_pooling(mode: str, expected: str, tmp_path: Path) -> None:
    tiny_encoders.write_directory(CASED, tmp_path)
    content = {"embedding_dimension": 64, "pooling_mode": mode, "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    with open_model(tmp_path) as source:
        assert source.encoder().pooling == expected


@pytest.mark.parametrize(("content", "expected"), [({"model_max_length": 32}, 32), ({"model_max_length": 10**30}, 64)])
def test_length_of_texts_by_the_tokenizer(content: dict, expected: int, tmp_path: Path) -> None:
    tiny_encoders.write_directory(MEAN, tmp_path)
    set_json("tokenizer_config.json", **content)(tmp_path)
    with open_model(tmp_path) as source:
        assert source.encoder().text_length == expected


# ---- the command line


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(tiny_encoders.write_gguf(MEAN, tmp_path_factory.mktemp("cli") / "tiny.gguf"))


def test_embed(path: str, mean, capsys, monkeypatch) -> None:
    expected = mean.embed(["iron", "the ore"])
    assert main(["embed", path, "iron", "the ore", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == path and answer["dimension"] == MEAN.hidden
    assert np.abs(np.array(answer["embeddings"], np.float32) - expected).max() <= BOUND
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"iron\nthe ore\n")))
    assert main(["embed", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert np.abs(np.array([line.split() for line in lines], np.float32) - expected).max() <= BOUND


def test_lines_of_standard_input(path: str, capsys, monkeypatch) -> None:
    """Only a line feed ends a line; no input gives no output; text that is not UTF-8 is the user's mistake."""
    for raw, count in ((b"", 0), (b"\n", 1), (b"iron\x0bore\xe2\x80\xa8rust\r\n\nore", 3)):
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(raw)))
        assert main(["embed", path]) == 0 and len(capsys.readouterr().out.splitlines()) == count
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"iron \xff")))
    assert main(["embed", path]) == 2 and "byte 5" in capsys.readouterr().err


def test_embed_says_what_it_cuts(path: str, capsys) -> None:
    assert main(["embed", path, "ore " * 20, "--max-seq-len", "8"]) == 0
    assert "longer than 8 tokens" in capsys.readouterr().err


def test_mistakes(path: str, tmp_path: Path, capsys) -> None:
    assert main(["embed", str(write_decoder(LLAMA, tmp_path / "llama")), "iron"]) == 2
    assert "generates text; embed needs an embedding model" in capsys.readouterr().err
    for verb in ("run --prompt iron", "bench", f"perplexity {__file__}", "plan --target l4"):
        name, *flags = verb.split()
        assert main([name, path, *flags]) == 2
        error = capsys.readouterr().err
        assert "embedding model" in error and error.count("\n") == 1
    assert main(["embed", path, "iron", "--max-seq-len", "100"]) == 2


def test_info(path: str, capsys) -> None:
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "bert" and facts["pooling"] == "mean" and facts["context_length"] == MEAN.context
    assert main(["info", path]) == 0
    assert "bert, an embedding model" in capsys.readouterr().out
