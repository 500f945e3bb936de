"""LoRA adapters as GGUF files: one that llama.cpp's converter made against the directory that it was made of, and our own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.cli import main
from ferrum_jax.convert import convert
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.opening import open_model
from support.adapter_directories import CASES, Folder
from support.goldens import adapter_cases

FILE = adapter_cases.HERE / "llama-file.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def config(folder):
    with open_model(folder(adapter_cases.LLAMA)) as source:
        return source.config()


def edited(path: Path, keys=None, tensors=None) -> Path:
    """The file of the golden with other keys or tensors; None leaves one out."""
    reader = gguf.GGUFReader(FILE)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    made = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    values, made = values | (keys or {}), made | (tensors or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        if isinstance(value, str | float):
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, array in made.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_of_llama_cpp_is_the_directory(folder, config):
    """Rows of queries and keys are in another order in the file; alpha / rank is in B."""
    right, found = (read_adapter(path, config) for path in (folder(adapter_cases.FILE), FILE))
    assert found.factors.keys() == right.factors.keys() and len(found.factors) == 3
    for key, pair in right.factors.items():
        assert all(map(np.array_equal, found.factors[key], pair)), key
    assert found.digest != right.digest and found.path == FILE


@pytest.mark.parametrize("name", ["llama-patterns", "llama-some-rslora", "qwen3"])
def test_what_is_written_is_read_as_it_was(name, folder, tmp_path):
    """In any of llama.cpp's formats that the numbers fit; ranks of several matrices become the largest."""
    case = CASES[name]
    base, adapter, out = folder(case.base), folder(case), tmp_path / "made.gguf"
    assert main(["convert", str(base), str(out), "--to", "gguf", "--adapter", str(adapter)]) == 0
    with open_model(base) as source:
        config = source.config()
    right, found = read_adapter(adapter, config).factors, read_adapter(out, config).factors
    assert found.keys() == right.keys()
    for key, (a, b) in right.items():
        made, rank = found[key], len(a)
        assert np.array_equal(made[0][:rank], a) and np.array_equal(made[1][:, :rank], b)
        assert not made[0][rank:].any() and not made[1][:, rank:].any()
    fields = gguf.GGUFReader(out).fields
    assert fields["general.type"].contents() == "adapter" and fields["adapter.type"].contents() == "lora"


def test_it_serves_next_to_the_weights_and_merged(folder, tmp_path):
    base, prompts = folder(adapter_cases.LLAMA), [[3, 4, 5, 6]]
    right = fj.load(base, dtype="float32", adapters={"one": folder(adapter_cases.FILE)}).logits(prompts, adapter="one")
    model = fj.load(base, dtype="float32", adapters={"one": FILE})
    assert np.array_equal(model.logits(prompts, adapter="one")[0], right[0])
    plain, merged = model.logits(prompts)[0], fj.load(base, dtype="float32", merge_adapter=FILE).logits(prompts)[0]
    assert np.abs(merged - right[0]).max() <= 1e-3 < 0.1 < np.abs(plain - right[0]).max()


def test_blocks_and_an_alpha_of_none(config, tmp_path):
    """llama.cpp's converter may write them in Q8_0; without alpha the scale is 1."""
    one = np.random.default_rng(0).normal(0, 1, (32, 256)).astype(np.float32)
    stored = gguf.quants.quantize(one, gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for suffix, array in (("a", stored), ("b", np.ones((256, 32), np.float16))):
        kind = gguf.GGMLQuantizationType.Q8_0 if suffix == "a" else None
        writer.add_tensor(f"blk.0.attn_output.weight.lora_{suffix}", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((a, b),) = read_adapter(path, config).factors.values()
    assert np.array_equal(a, gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)) and (b == 1).all()


DOWN = "blk.1.ffn_down.weight.lora_"


@pytest.mark.parametrize(
    ("keys", "tensors", "text"),
    [
        ({"general.type": "model"}, {}, "key general.type: is 'model'; an adapter for this model has 'adapter'"),
        ({"general.architecture": "qwen3"}, {}, "key general.architecture: is 'qwen3'; .* has 'llama'"),
        ({"adapter.type": "loha"}, {}, "key adapter.type: is 'loha'; .* has 'lora'"),
        ({"adapter.lora.alpha": "3"}, {}, "key adapter.lora.alpha: alpha must be a number of sane size"),
        ({"adapter.alora.invocation_tokens": [1]}, {}, "key adapter.alora.invocation_tokens: is not supported"),
        ({}, {f"{DOWN}a": None}, f"tensor {DOWN}a: is missing"),
        ({}, {f"{DOWN}b": None}, f"tensor {DOWN}b: is missing"),
        ({}, {f"{DOWN}a": np.ones((3, 512), np.float32)}, "lora_a has rank 3, lora_b 2"),
        ({}, {f"{DOWN}b": np.ones((255, 2), np.float32)}, r"shape \[255, 2\] does not fit this model: \[256, rank\]"),
        ({}, {f"{DOWN}b": np.full((256, 2), np.nan, np.float32)}, "holds values that are not finite"),
        ({}, {f"{DOWN}b": np.full((256, 2), 3e38, np.float32)}, "times alpha 3.0 / rank is beyond float32"),
        ({}, {"token_embd.weight.lora_a": np.ones((2, 256), np.float32)}, "tensor token_embd.weight.lora_a: is not supported"),
        ({}, {"blk.1.attn_norm.weight": np.ones(256, np.float32)}, "tensor blk.1.attn_norm.weight: is not supported"),
        ({}, {"blk.3.ffn_down.weight.lora_a": np.ones((2, 512), np.float32)}, "does not fit this model, which has 3 layers"),
    ],
)
def test_what_does_not_fit_is_named(keys, tensors, text, config, tmp_path):
    path = edited(tmp_path / "wrong.gguf", keys, tensors)
    with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=text) as caught:
        read_adapter(path, config)
    assert str(path) in str(caught.value)


def test_what_convert_refuses(folder, tmp_path):
    base, adapter = folder(adapter_cases.LLAMA), folder(adapter_cases.FILE)
    with pytest.raises(ValueError, match="adapter: is written as a GGUF file, alone and in F32"):
        convert(base, tmp_path / "made", to="orbax", adapter=adapter)
    with pytest.raises(FileExistsError):
        convert(base, FILE, to="gguf", adapter=adapter)
    with pytest.raises(fj.ModelNotFoundError, match=r"or a \.gguf file; there is none"):
        convert(base, tmp_path / "made.gguf", to="gguf", adapter=tmp_path / "nothing.gguf")
    other = dataclasses.replace(adapter_cases.FILE, name="file-qwen2", base=adapter_cases.QWEN2)
    with pytest.raises(fj.ModelFileError, match=r"is .llama.; an adapter for this model has .qwen2."):
        read_adapter(FILE, open_model(folder(other.base)).config())
