"""Packed checkpoints of the newer families, with the modules that published ones have packed: as the directory whose matrices
are what the packed ones stand for, or refused by name with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.quantize import PLAIN, plain_numbers
from pallas_kernels.blocks import unpack
from support.directories import Packing, edit_tensors
from support.goldens import tiny_directories, tiny_gemma, tiny_hybrids, tiny_latent, tiny_mixtures

FAMILIES = {"glm4moe": tiny_mixtures, "lfm2moe": tiny_mixtures, "deepseek3": tiny_latent, "gemma3": tiny_gemma}
FAMILIES |= {"gemma4": tiny_gemma, "qwen35moe": tiny_hybrids, "qwen3next": tiny_hybrids}
GPTQ, AWQ = Packing("gptq", 4, 32), Packing("awq", 4, 32, symmetric=False)
COMPRESSED = Packing("compressed-tensors", 4, 32, scales="BF16")
CASES = {
    "qwen35moe": (GPTQ, r"self_attn\.\w_proj|mlp\.(experts\.\d+|shared_expert)\.\w+_proj"),  # delta nets are left out
    "qwen3next": (COMPRESSED, r"self_attn\.\w_proj|mlp\.(experts\.\d+|shared_expert)\.\w+_proj"),
    "glm4moe": (AWQ, r".*_proj"),
    "deepseek3": (AWQ, r".*_proj(_with_mqa)?(?<!kv_b_proj)"),
    "lfm2moe": (GPTQ, r"feed_forward\..*w\d|self_attn\.\w+_proj|conv\.(in|out)_proj"),
    "gemma3": (COMPRESSED, r".*_proj"),
    "gemma4": (COMPRESSED, r".*_proj|per_layer_\w+"),
}


def directories(name: str, packing: Packing, packed: str, folder: Path) -> tuple[Path, Path]:
    """A packed directory of a tiny model, and one of the numbers that it stands for. packed: matches modules in a layer."""
    tiny, paths = FAMILIES[name], (folder / "packed", folder / "plain")
    spec = next(case for case in tiny.CASES if case.name == name)
    for path in paths:
        tiny.write_directory(spec, path)
    made: dict[str, tiny_directories.Numbers] = {}

    def is_packed(key: str) -> bool:
        inside = re.fullmatch(r"model\.layers\.\d+\.(.+)\.weight", key)
        return bool(inside and re.fullmatch(packed, inside[1]))

    def pack(tensors: dict) -> None:
        for key in [key for key in tensors if is_packed(key)]:
            dtype, shape, data = tensors.pop(key)
            module, of = key.removesuffix(".weight"), SimpleNamespace(packing=packing, seed=5)
            made[key] = tiny_directories.numbers(of, module, shape, float(tiny_directories.from_bytes(data, dtype).std()))
            for own, (values, kind) in tiny_directories.packed(of, module, made[key]).items():
                tensors[own] = kind, values.shape, tiny_directories.to_bytes(values, kind)

    def unpack(tensors: dict) -> None:
        for key, numbers in made.items():
            values = numbers.dense()
            tensors[key] = "F32", values.shape, tiny_directories.to_bytes(values, "F32")

    edit_tensors(paths[0] / "model.safetensors", pack)
    edit_tensors(paths[1] / "model.safetensors", unpack)
    config = json.loads((paths[0] / "config.json").read_text())
    config["quantization_config"] = tiny_directories.quantization(packing)
    if packing.method == "gptq":  # as the publishers' files say what is left out
        config["quantization_config"]["dynamic"] = {"-:.*linear_attn.*": {}, "-:.*mtp.*": {}}
    (paths[0] / "config.json").write_text(json.dumps(config))
    assert made
    return paths


def numbers_of(source, info) -> np.ndarray:
    """float32, of the tensor's shape."""
    raw = source.read(info)
    if info.format in PLAIN:
        return plain_numbers(raw.view(PLAIN[info.format]), info.format).reshape(info.shape)
    return np.asarray(unpack(raw.reshape(*info.shape[:-1], -1), info.format))


@pytest.mark.parametrize("name", CASES)
def test_packed_matrices_are_the_numbers_that_they_stand_for(name, tmp_path):
    """Both have the tensors and the configuration of one model, whose logits the goldens of its family check."""
    packed, plain = directories(name, *CASES[name], tmp_path)
    with open_model(packed) as found, open_model(plain) as right:
        assert found.config() == right.config() and found.tensors.keys() == right.tensors.keys()
        blocks = {info.format for info in found.tensors.values()} - set(PLAIN)
        assert blocks and blocks <= {"Q4_0", "U4_32_F16", "U4_32_BF16"}
        for key, info in found.tensors.items():
            assert np.array_equal(numbers_of(found, info), numbers_of(right, right.tensors[key])), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen35moe", "glm4moe"])
def test_packed_models_have_the_logits_of_the_numbers(name, tmp_path):
    found, right = (
        fj.load(path, dtype="float32").logits([list(range(3, 20))])[0] for path in directories(name, *CASES[name], tmp_path)
    )
    assert np.abs(found - right).max() <= 1e-3 and right.std() > 0.1


@pytest.mark.parametrize(
    ("name", "packed", "text"),
    [
        ("qwen35moe", r"linear_attn\.in_proj_qkv", r"linear_attn.in_proj_qkv\.\w+: is packed, .* its rows or columns get"),
        ("qwen3next", r"linear_attn\.in_proj_qkvz", r"linear_attn.in_proj_qkvz\.\w+: is packed, .* its rows or columns get"),
        ("deepseek3", r"self_attn\.kv_b_proj", r"self_attn.kv_b_proj\.\w+: is packed, .* its rows or columns get"),
    ],
)
def test_what_cannot_be_packed_is_named(name, packed, text, tmp_path):
    path, _ = directories(name, GPTQ, packed, tmp_path)
    with pytest.raises(fj.UnsupportedModelError, match=text), open_model(path):
        pass
