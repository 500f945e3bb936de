"""Whether an output matrix is the embedding: the stored numbers decide, as in transformers 5.24.

transformers' numbers for a directory that config.json ties by mistake are the golden `llama-not-tied`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.opening import open_model
from support.directories import GPTQ, LLAMA, edit, edit_tensors, write
from support.goldens import tiny_directories
from support.tiny_gguf import write_tiny_llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = [[5, 6, 7, 8]]


def directory(path: Path, change, tied: bool = True, **spec) -> Path:
    """A directory whose config.json ties or not, its tensors changed."""
    write(dataclasses.replace(LLAMA, dtype="F32", **spec), path, {"tie_word_embeddings": tied})
    edit_tensors(path / "model.safetensors", change)
    return path


def converted(entry: tuple, dtype: str) -> tuple:
    values = tiny_directories.from_bytes(entry[2], entry[0])
    return dtype, entry[1], tiny_directories.to_bytes(values, dtype)


def one_bit(entry: tuple) -> tuple:
    return (*entry[:2], entry[2][:-4] + bytes([entry[2][-4] ^ 1]) + entry[2][-3:])


def stored(path: Path) -> bool:
    """Whether there is a separate output matrix; the loaded parameters are exactly those of the table."""
    with open_model(path) as source:
        parameters(source, source.config())
        return "output.weight" in source.tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("change", "two"),
    [
        (lambda t: None, True),
        (lambda t: t.update({HEAD: t[EMBEDDING]}), False),
        (lambda t: t.update({HEAD: one_bit(t[EMBEDDING])}), True),
        (lambda t: t.update({HEAD: converted(t[EMBEDDING], "F16")}), True),
        (lambda t: t.update({EMBEDDING: converted(t[EMBEDDING], "F16"), HEAD: converted(t[EMBEDDING], "F16")}), False),
        (lambda t: t.update({EMBEDDING: converted(t[EMBEDDING], "BF16"),
                             HEAD: converted(converted(t[EMBEDDING], "BF16"), "F32")}), False),
    ],
    ids=["other", "equal", "one bit", "rounded", "half", "widened"],
)  # fmt: skip
def test_what_is_stored_decides(change, two: bool, tied: bool, tmp_path: Path) -> None:
    path = directory(tmp_path / "model", change, tied)
    assert stored(path) is two
    model = fj.load(path, dtype="float32")
    assert ("unembedding" in model.params) is two
    edit(path / "config.json", lambda content: content.update(tie_word_embeddings=not tied))
    assert (fj.load(path, dtype="float32").logits(IDS)[0] == model.logits(IDS)[0]).all()


def test_in_parts(tmp_path: Path) -> None:
    """The two matrices in two files."""
    path = tmp_path / "model"
    write(dataclasses.replace(LLAMA, shards=4), path, {"tie_word_embeddings": True})
    assert stored(path)


def test_only_the_output_is_there(tmp_path: Path) -> None:
    """transformers swaps the two: the matrix that is there is both."""
    whole = directory(tmp_path / "whole", lambda t: t.pop(HEAD))
    path = directory(tmp_path / "model", lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert not stored(path)
    assert (fj.load(path, dtype="float32").logits(IDS)[0] == fj.load(whole, dtype="float32").logits(IDS)[0]).all()
    edit(path / "config.json", lambda content: content.update(tie_word_embeddings=False))
    with pytest.raises(fj.ModelFileError, match=rf"tensor {EMBEDDING}: is missing"):
        stored(path)


def test_a_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", lambda t: t.update({HEAD: ("F32", (319, 64), t[EMBEDDING][2][:-256])}))
    with pytest.raises(fj.ModelFileError, match=rf"tensor {HEAD}: shape \[319, 64\]"):
        stored(path)
    path = directory(tmp_path / "other", lambda t: t.update({"lm_head.bias": ("F32", (320,), bytes(1280))}))
    with pytest.raises(fj.ModelFileError, match=r"tensor lm_head\.bias: is unknown"):
        stored(path)


def test_a_packed_output_is_not_the_embedding(tmp_path: Path) -> None:
    """GPTQ's `lm_head: true` in a checkpoint that config.json ties."""
    path = write(GPTQ, tmp_path / "model", {"tie_word_embeddings": True})
    source = "model.layers.0.mlp.gate_proj."  # 64 x 64: its tensors, five times, are a head of 320 rows

    def pack(t: dict) -> None:
        for suffix, axis in (("qweight", 1), ("qzeros", 1), ("scales", 1), ("g_idx", None)):
            dtype, shape, raw = t[source + suffix]
            values = np.frombuffer(raw, "<i4" if dtype == "I32" else "<f2").reshape(shape)
            values = values if axis is None else np.concatenate([values] * 5, axis)
            t["lm_head." + suffix] = dtype, values.shape, values.tobytes()
        del t[HEAD]

    edit_tensors(path / "model.safetensors", pack)
    with open_model(path) as model:
        assert model.tensors["output.weight"].shape == (320, 64) and model.tensors["output.weight"].format.startswith("U4")
    assert fj.load(path, dtype="float32").logits(IDS)[0].shape == (4, 320)


def test_headers_alone_say_what_config_json_says(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", lambda t: None)
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    with open_model(path, header_only=True) as source:
        assert "output.weight" not in source.tensors


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_gguf(format: str, tmp_path: Path) -> None:
    """An output matrix that repeats the embedding's blocks is stored once, as if there were none."""
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((64, 64)).astype(np.float32)
    other = matrix + np.eye(64, dtype=np.float32)
    logits = {}
    for name, head in (("equal", matrix), ("other", other), ("none", None)):
        tensors = {"token_embd.weight": matrix, "output.weight": head}
        path = write_tiny_llama(tmp_path / f"{name}.gguf", tensor_type=format, tensors=tensors)
        assert stored(path) is (name == "other")
        logits[name] = fj.load(path, dtype="float32").logits(IDS)[0]
    assert (logits["equal"] == logits["none"]).all() and (logits["equal"] != logits["other"]).any()
