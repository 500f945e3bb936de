"""Checkpoint directories: what is refused by name, and that nothing is in memory twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.loading import validate
from ferrum_jax.weights.opening import open_model
from support.directories import GPTQ, LLAMA, MOE, Packing, Spec, edit, edit_tensors, write
from support.goldens import tiny_directories

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0."


def refused(path: Path, said: str, kind: type[ModelFileError] = ModelFileError) -> None:
    """Both ways in give the same error, which names the directory or a file in it."""
    for way in (validate, fj.load):
        with pytest.raises(kind, match=said) as caught:
            way(path)
        assert str(path) in str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(LLAMA, tmp_path / "model")


# Files


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = write(dataclasses.replace(LLAMA, shards=3), tmp_path / "model")
    validate(path)
    shard = path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    refused(path, r"model-00002-of-00003\.safetensors: this part of the checkpoint is missing")
    shard.write_bytes(whole)
    (path / INDEX).unlink()
    refused(path, r"model\.safetensors\.index\.json: is missing, and there are 3")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"lm_head.weight": "gone.safetensors"}), r"gone\.safetensors: this part .* missing"),
        (
            lambda m: m.update({"lm_head.weight": "../out.safetensors"}),
            r"'\.\./out\.safetensors' is not a file of this directory",
        ),
        (lambda m: m.update({"lm_head.weight": 7}), r"7 is not a file of this directory"),
        (lambda m: m.update({"more.weight": "model-00001-of-00002.safetensors"}), r"tensor more\.weight: is missing; the"),
        (lambda m: m.update({"lm_head.weight": "pytorch_model.bin"}), r"pytorch_model\.bin is pickled"),
        (lambda m: m.clear(), r"key weight_map"),
    ],
)
def test_an_index_that_errs(change, said: str, tmp_path: Path) -> None:
    path = write(dataclasses.replace(LLAMA, shards=2), tmp_path / "model")
    edit(path / INDEX, lambda content: change(content["weight_map"]))
    refused(path, said)


def test_an_index_counts_beside_one_whole_file_too(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    refused(model, r"gone\.safetensors: this part of the checkpoint is missing")
    (model / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}))
    validate(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, r"has no \.safetensors file")
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"):
        (model / name).write_bytes(b"\x80\x02}q\x00.")
        refused(model, rf"{name}: is pickled, which is unsafe", UnsupportedModelError)
        (model / name).unlink()


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, r"is a directory without a config\.json", UnsupportedModelError)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "[]", "must be a JSON object"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"a": 1, "a": 2}', "'a' appears twice"),
        ("tokenizer.json", "{}", r"key model\.vocab: is missing"),
        ("tokenizer.json", None, r"tokenizer\.json: is missing"),
        ("tokenizer_config.json", '{"eos_token": "nobody"}', "key eos_token: 'nobody' is not a token"),
        ("tokenizer_config.json", '{"chat_template": "{% for"}', "chat_template"),
        ("chat_template.jinja", "{% for", "chat_template"),
        ("generation_config.json", '{"eos_token_id": "2"}', "key eos_token_id"),
        ("generation_config.json", "\x00", "not valid JSON"),
    ],
)
def test_damaged_json_is_named(name: str, text: str | None, said: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    if text is not None:
        (model / name).write_text(text)
    refused(model, said)


# Tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(LAYER + "mlp.up_proj.weight"), r"tensor model\.layers\.0\.mlp\.up_proj\.weight: is missing"),
        (lambda t: t.pop("lm_head.weight"), r"tensor lm_head\.weight: is missing, and config\.json does not tie"),
        (lambda t: t.update({"more.weight": ("F32", (1,), bytes(4))}), r"tensor more\.weight: is unknown"),
        (lambda t: t.update({LAYER + "mlp.gate_proj.bias": ("F32", (64,), bytes(256))}), r"gate_proj\.bias: is not expected"),
        (lambda t: t.update({"model.layers.1.input_layernorm.weight": ("F32", (64,), bytes(256))}), r"has only 1 layers"),
        (lambda t: t.update({"lm_head.weight": ("F32", (64, 64), bytes(64 * 256))}), r"lm_head\.weight: shape \[64, 64\]"),
        (lambda t: t.update({"lm_head.weight": ("I16", (320, 64), bytes(320 * 128))}), r"lm_head\.weight: dtype I16 is not"),
        (lambda t: t.update({"lm_head.weight": ("F8_E4M3", (320, 64), bytes(320 * 64))}), r"dtype F8_E4M3 is not supported"),
        (lambda t: t.update({"model.norm.weight": ("F32", (64,), b"\xff" * 256)}), r"model\.norm\.weight: holds values"),
    ],
)
def test_tensors_that_do_not_fit(change, said: str, model: Path) -> None:
    edit_tensors(model / "model.safetensors", change)
    with pytest.raises(ModelFileError, match=said):
        fj.load(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(LAYER + "mlp.experts.2.up_proj.weight"), r"mlp\.experts\.2\.up_proj\.weight: is missing"),
        (lambda t: t.update({LAYER + "mlp.experts.4.up_proj.weight": ("F32", (32, 64), bytes(32 * 256))}), r"only 4 experts"),
        (
            lambda t: t.update({LAYER + "mlp.experts.1.up_proj.weight": ("F32", (32, 64), bytes(32 * 256))}),
            r"experts\.1\.up_proj\.weight: is F32 \[32, 64\], but .*experts\.0\.up_proj\.weight is BF16 .* one dtype",
        ),
        (
            lambda t: t.update({LAYER + "mlp.experts.gate_up_proj": ("F32", (4, 64, 64), bytes(4 * 64 * 256))}),
            r"is there twice",
        ),
    ],
)
def test_experts_that_do_not_fit(change, said: str, tmp_path: Path) -> None:
    path = write(MOE, tmp_path / "moe")
    edit_tensors(path / "model.safetensors", change)
    refused(path, said)


# Quantization


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' is not supported; supported: gptq, awq,"),
        ({"quant_method": "fp8"}, "quant_method: 'fp8'"),
        ({"quant_method": None, "bits": None}, "bits: None"),
        ({"bits": 3}, "bits: 3 is not supported; supported: 4, 8"),
        ({"bits": True}, "bits: True"),
        ({"group_size": 0}, "group_size: 0"),
        ({"group_size": 48}, "group_size: 48"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin'"),
        ({"is_marlin_format": True}, "checkpoint_format: 'marlin'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "awq", "version": "gemv"}, "version: 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "bits: 8"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
    ],
)
def test_unknown_quantization_is_named(keys: dict, said: str, tmp_path: Path) -> None:
    path = write(GPTQ, tmp_path / "gptq")
    edit(path / "config.json", lambda content: content["quantization_config"].update(keys))
    refused(path, rf"config\.json: key quantization_config: key {said}", UnsupportedModelError)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"format": "float-quantized"}, "format"),
        ({"input_activations": {"num_bits": 8}}, "input_activations"),
        ({"targets": ["re:.*"]}, "targets"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}}, "weights"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "tensor"}}, "strategy"),
    ],
)
def test_unknown_compressed_tensors_are_named(keys: dict, said: str, tmp_path: Path) -> None:
    path = write(dataclasses.replace(LLAMA, packing=Packing("compressed-tensors", 4, 32)), tmp_path / "model")
    edit(path / "config.json", lambda content: content["quantization_config"]["config_groups"]["group_0"].update(keys))
    refused(path, f"key {said}: ", UnsupportedModelError)


def test_packed_matrices_must_be_explained(tmp_path: Path) -> None:
    path = write(GPTQ, tmp_path / "gptq", {"quantization_config": None})
    refused(path, "is packed, but neither config.json nor quantize_config.json says how")


@pytest.mark.parametrize(
    ("suffix", "value", "said"),
    [
        ("qweight", None, "qweight: is missing"),
        ("scales", None, "scales: is missing"),
        ("scales", ("I32", (2, 64), bytes(512)), r"scales: is I32 where F16 or BF16 or F32"),
        ("scales", ("F16", (1, 64), bytes(128)), r"scales: shape \[1, 64\]; expected \[2, 64\]"),
        ("qweight", ("F32", (8, 64), bytes(2048)), r"qweight: is F32"),
        ("g_idx", ("I32", (64,), bytes(256)), r"g_idx: does not put 32 columns into each"),
        ("g_idx", ("I32", (64,), b"\xff\xff\xff\x7f" * 64), r"g_idx: does not put 32 columns into each"),
        ("weight", ("F16", (64, 64), bytes(8192)), r"q_proj\.weight: is unknown"),
        ("bias", ("F16", (64,), b"\x01" * 128), r"q_proj\.bias: is unknown in a LlamaForCausalLM of this configuration"),
    ],
)
def test_packed_tensors_that_do_not_fit(suffix: str, value, said: str, tmp_path: Path) -> None:
    path = write(GPTQ, tmp_path / "gptq")
    name = f"{LAYER}self_attn.q_proj.{suffix}"
    edit_tensors(path / "model.safetensors", lambda t: t.pop(name) if value is None else t.update({name: value}))
    refused(path, said)


def test_a_bias_of_zeros_that_a_quantizer_added_is_left_out(tmp_path: Path) -> None:
    path = write(GPTQ, tmp_path / "gptq")
    name = f"{LAYER}self_attn.q_proj.bias"
    edit_tensors(path / "model.safetensors", lambda t: t.update({name: ("F16", (64,), bytes(128))}))
    with open_model(path) as model:
        assert "blk.0.attn_q.bias" not in model.tensors


# Reading


def test_leftovers_are_left_out(model: Path) -> None:
    """What old versions wrote of the rotary frequencies: transformers takes those of config.json."""
    name = LAYER + "self_attn.rotary_emb.inv_freq"
    edit_tensors(model / "model.safetensors", lambda t: t.update({name: ("F32", (16,), bytes(64))}))
    with open_model(model) as opened:
        assert len(opened.tensors) == 12


def test_experts_are_read_straight_into_their_stack(tmp_path: Path) -> None:
    """Of a stack of 64 MiB nothing but the array it is read into is allocated."""
    import tracemalloc

    sizes = {
        "layers": 1,
        "hidden": 512,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "experts": 32,
        "top_k": 2,
        "expert_ff": 1024,
    }
    path = write(Spec("big", "MixtralForCausalLM", "F32", **sizes), tmp_path / "big")
    with open_model(path) as model:
        info = model.tensors["blk.0.ffn_up_exps.weight"]
        assert info.shape == (32, 1024, 512) and info.nbytes == 64 << 20
        out = np.empty(info.nbytes, np.uint8)
        tracemalloc.start()
        model.read_into(info, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 1 << 20
    one = tiny_directories.bell(1, "model.layers.0.block_sparse_moe.experts.7.w3", (1024, 512)) * np.float32(1.3 * 512**-0.5)
    assert (out.view(np.float32).reshape(info.shape)[7] == one).all()


def test_a_file_that_becomes_shorter(model: Path) -> None:
    with open_model(model) as opened:
        info = max(opened.tensors.values(), key=lambda info: info.offset)
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ModelFileError, match="ends inside tensor"):
            opened.read(info)


def test_header_only(model: Path) -> None:
    file = model / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    with open_model(model, header_only=True) as opened:
        assert opened.config().num_layers == 1
        with pytest.raises(ModelFileError, match="only the header is here"):
            opened.read(opened.tensors["output.weight"])
    refused(model, "truncated")


def test_info_of_a_directory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ferrum_jax.cli import main

    assert main(["info", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "llama" and facts["chat_template"] is True and facts["num_layers"] == 1
    assert {row["format"] for row in facts["formats"]} == {"BF16"}


def test_a_header_survives_json(tmp_path: Path) -> None:
    import jax

    from ferrum_jax import headers
    from ferrum_jax.distributed import Placement
    from ferrum_jax.weights.names import parameters
    from ferrum_jax.weights.stream import abstract_parameters

    with open_model(write(GPTQ, tmp_path / "gptq")) as model:
        read = headers.from_json(headers.to_json(model), Path("elsewhere"))
        assert read.config() == model.config()
        here = Placement.of()
        trees = [abstract_parameters(parameters(header, read.config()), here) for header in (model, read)]
        assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
