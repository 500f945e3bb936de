"""gpt-oss: what its files do not state, both layouts of its experts, what is refused, and conversion both ways.

That its numbers are right is what the goldens check (test_model_goldens, test_directory_goldens)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.convert import convert
from ferrum_jax.loading import validate
from ferrum_jax.weights.gguf import open_gguf
from ferrum_jax.weights.opening import open_model
from support.directories import edit_tensors, write
from support.goldens import directory_cases, golden_cases, tiny_models

GGUF = next(case.spec for case in golden_cases.CASES if case.name == "gpt-oss-mxfp4")
CASES = {case.name: case for case in directory_cases.CASES}
BF16, MXFP4 = CASES["gpt-oss-bf16"], CASES["gpt-oss-mxfp4"]
EXPERTS = "model.layers.1.mlp.experts."
IDS = [[3, 9, 4, 1, 5, 9, 2, 6, *range(40)]]


def changed(path: Path, **metadata) -> Path:
    """The tiny GGUF file with other metadata of its architecture (None: without)."""
    tiny_models.write(GGUF, path.with_suffix(".whole"))
    reader = gguf.GGUFReader(path.with_suffix(".whole"))
    writer = gguf.GGUFWriter(path, "gpt-oss")
    values = {key: (field.contents(), field.types[0], field.types[-1]) for key, field in reader.fields.items()}
    for key, (value, kind, element) in values.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key.removeprefix("gpt-oss.") not in metadata:
            writer.add_key_value(key, value, kind, element if kind == gguf.GGUFValueType.ARRAY else None)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(f"gpt-oss.{key}", value)
        elif value is not None:
            writer.add_uint32(f"gpt-oss.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_gguf_does_not_state(tmp_path: Path) -> None:
    tiny_models.write(GGUF, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        config = file.config()
    assert fj.ModelConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config.by_layer("sliding_window") == (24, 0, 24) and config.attention_sinks
    assert (config.swiglu_limit, config.swiglu_alpha, config.norm_topk_prob) == (7.0, 1.702, True)
    scaling = config.rope_scaling
    assert not scaling.truncate and abs(scaling.attention_factor - (0.1 * np.log(8) + 1)) < 1e-6


def test_a_pattern_that_is_stated_counts(tmp_path: Path) -> None:
    with open_gguf(changed(tmp_path / "m.gguf", **{"attention.sliding_window_pattern": [False, True, True]})) as file:
        assert file.config().by_layer("sliding_window") == (0, 24, 24)
    with open_gguf(changed(tmp_path / "none.gguf", **{"attention.sliding_window": None})) as file:
        assert file.config().sliding_window == 0


def test_what_config_json_does_not_state(tmp_path: Path) -> None:
    """transformers' class has YaRN and alternating windows of 128 then."""
    absent = ("rope_scaling", "layer_types", "sliding_window", "swiglu_limit")
    with open_model(write(BF16, tmp_path / "model", dict.fromkeys(absent))) as model:
        config = model.config()
    assert config.by_layer("sliding_window") == (128, 0) and config.swiglu_limit == 7.0
    scaling = config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context, scaling.truncate) == ("yarn", 32.0, 4096, False)


def test_mxfp4_stays_mxfp4_with_the_numbers_of_the_file(tmp_path: Path) -> None:
    """Blocks are ggml's, one for one: gguf-py unpacks them to the numbers that codes and scales of the file stand for."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    raw = {}
    path = write(MXFP4, tmp_path / "model")
    edit_tensors(path / "model.safetensors", raw.update)

    def numbers(name: str) -> np.ndarray:  # [experts, rows, columns]
        _, shape, data = raw[f"{EXPERTS}{name}_blocks"]
        codes = np.frombuffer(data, np.uint8).reshape(shape)
        scales = np.frombuffer(raw[f"{EXPERTS}{name}_scales"][2], np.uint8).reshape(shape[:3])
        values = np.stack([table[codes & 15], table[codes >> 4]], axis=-1).reshape(*shape[:3], 32)
        return (values * np.exp2(scales[..., None].astype(np.float32) - 127)).reshape(*shape[:2], -1)

    both = numbers("gate_up_proj")
    wanted = {"gate": both[:, ::2], "up": both[:, 1::2], "down": numbers("down_proj")}
    with open_model(path) as model:
        for name, values in wanted.items():
            info = model.tensors[f"blk.1.ffn_{name}_exps.weight"]
            assert (info.format, info.shape) == ("MXFP4", values.shape) and info.nbytes == values.size // 32 * 17
            blocks = model.read(info)
            found = gguf.quants.dequantize(blocks.reshape(*values.shape[:2], -1), gguf.GGMLQuantizationType.MXFP4)
            assert np.array_equal(found, values)
            part = np.empty(170, np.uint8)
            model.read_into(info, part, info.nbytes // 2 + 17)
            assert np.array_equal(part, blocks[info.nbytes // 2 + 17 :][:170])
    assert set(fj.load(path).memory()["parameters"]) >= {"MXFP4", "BF16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss-bf16", "gpt-oss-mxfp4"])
def test_conversion_both_ways(name: str, tmp_path: Path) -> None:
    """The converter's splitting and reordering is undone: the same logits, bit for bit."""
    path = write(CASES[name], tmp_path / "model")
    expected = fj.load(path, dtype="float32").logits(IDS)[0]
    remarks: list[str] = []
    file = convert(path, tmp_path / "m.gguf", to="gguf", progress=lambda done, total, text: remarks.append(text))
    assert not any("window" in text for text in remarks)
    saved = convert(file, tmp_path / "saved", to="orbax")
    for made in (file, saved, convert(saved, tmp_path / "again.gguf", to="gguf")):
        assert np.array_equal(fj.load(made, dtype="float32").logits(IDS)[0], expected), made.name
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_up_exps.weight"] == name.rpartition("-")[2].upper()
    assert {types[f"blk.0.{x}"] for x in ("ffn_up_exps.bias", "ffn_gate_inp.weight", "attn_sinks.weight")} == {"F32"}


def test_quantized_at_load(tmp_path: Path) -> None:
    path = write(BF16, tmp_path / "model")
    kept = fj.load(path, dtype="float32").logits(IDS)[0]
    made = fj.load(path, dtype="float32", quantize="q8_0")
    error = np.sqrt(((made.logits(IDS)[0] - kept) ** 2).mean(axis=1))
    assert set(made.memory()["parameters"]) == {"Q8_0", "F32"} and np.median(error) < 0.15  # routers flip
    with pytest.raises(fj.UnsupportedModelError, match=r"gate_up_proj: is MXFP4 already and would lose twice as Q8_0"):
        fj.load(write(MXFP4, tmp_path / "packed"), quantize="q8_0")


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    for config, words in (
        ({"layer_types": ["full_attention", "sliding_attention"]}, "windows that are not those of every other layer"),
        ({"swiglu_limit": 5.0}, "a SwiGLU with limit 5.0 and alpha 1.702"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "YaRN with truncate true"),
    ):
        path = write(BF16, tmp_path / "model", config)
        with pytest.raises(fj.UnsupportedModelError, match=f"{words}.* cannot be written as GGUF"):
            convert(path, tmp_path / "out.gguf", to="gguf")
    llama = write(
        CASES["llama3-bf16"], tmp_path / "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}
    )
    with pytest.raises(fj.UnsupportedModelError, match="truncate false cannot be written as GGUF"):
        convert(llama, tmp_path / "out.gguf", to="gguf")


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def reshaped(name: str, *shape: int):
    return lambda tensors: tensors.update({name: (tensors[name][0], shape, tensors[name][2])})


DAMAGE = {
    "no sinks": (BF16, lambda t: t.pop("model.layers.1.self_attn.sinks"), r"model\.layers\.1\.self_attn\.sinks: is missing"),
    "a bias missing": (BF16, lambda t: t.pop(EXPERTS + "down_proj_bias"), r"experts\.down_proj_bias: is missing"),
    "output without bias": (
        BF16,
        lambda t: t.pop("model.layers.0.self_attn.o_proj.bias"),
        r"model\.layers\.0\.self_attn\.o_proj\.bias: is missing",
    ),
    "a bias as weight": (
        BF16,
        rename(EXPERTS + "down_proj_bias", EXPERTS + "down_bias"),
        r"experts\.down_bias: is unknown in a GptOssForCausalLM",
    ),
    "rows first": (BF16, reshaped(EXPERTS + "gate_up_proj", 8, 256 * 128, 2), r"gate_up_proj: shape .*; expected"),
    "blocks alone": (MXFP4, lambda t: t.pop(EXPERTS + "down_proj_scales"), "down_proj_blocks: is there without its scales"),
    "scales alone": (MXFP4, lambda t: t.pop(EXPERTS + "down_proj_blocks"), "down_proj_scales: is there without its blocks"),
    "scales of other rows": (
        MXFP4,
        reshaped(EXPERTS + "down_proj_scales", 8, 4, 256),
        r"down_proj_scales: is U8 \[8, 4, 256\]",
    ),
    "blocks of other sizes": (
        MXFP4,
        reshaped(EXPERTS + "down_proj_blocks", 8, 256, 8, 8),
        "down_proj_blocks: is U8 .*, not U8",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name: str, tmp_path: Path) -> None:
    spec, damage, words = DAMAGE[name]
    path = write(spec, tmp_path / "model")
    edit_tensors(path / "model.safetensors", damage)
    with pytest.raises(fj.ModelFileError, match=words):
        validate(path)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path, name = write(MXFP4, tmp_path / "model"), EXPERTS + "down_proj_scales"

    def damage(tensors) -> None:
        kind, shape, data = tensors[name]
        tensors[name] = kind, shape, data[:-1] + b"\xff"

    edit_tensors(path / "model.safetensors", damage)
    with pytest.raises(fj.ModelFileError, match=r"down_proj_scales: holds scales that are no number"):
        fj.load(path)


def test_packed_experts_need_a_config_that_says_so(tmp_path: Path) -> None:
    path = write(MXFP4, tmp_path / "model", {"quantization_config": None})
    with pytest.raises(fj.ModelFileError, match=r"gate_up_proj_blocks: is unknown in a GptOssForCausalLM"):
        validate(path)
    other = write(MXFP4, tmp_path / "other", {"quantization_config": {"quant_method": "mxfp4", "rotation": "hadamard"}})
    with pytest.raises(fj.UnsupportedModelError, match="key rotation: 'hadamard' is not supported"):
        validate(other)


def test_no_biases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fj.UnsupportedModelError, match="key attention_bias: false is not supported"):
        validate(write(BF16, tmp_path / "model", {"attention_bias": False}))


def test_ends_of_its_answers(tmp_path: Path) -> None:
    """`<|return|>` and `<|call|>` end a generation by their text, and then `<|end|>` is a part of the answer."""
    from ferrum_jax.tokenizer.vocabulary import mend_types

    ids = {"<|start|>": 0, "<|end|>": 1, "<|return|>": 2, "<|call|>": 3, "<|message|>": 4}
    assert mend_types(ids, [3] * 5, 2) == {2, 3}
