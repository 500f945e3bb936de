"""Headers of packed checkpoints: keys that change the computation are refused by name, and stored zero points count more than
the header."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.schemes import scheme_of
from pallas_kernels.blocks import unpack
from support.directories import LLAMA, Packing, edit, edit_tensors, write
from unit.weights.test_packed import DOWN, unpacked

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
# As GPTQModel 5 writes it into config.json.
GPTQMODEL = GPTQ | {
    "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:5.4.0"], "damp_percent": 0.05, "mse": 0.0, "fallback": {"strategy": "rtn"}},
}  # fmt: skip
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False,
           "block_structure": None, "observer": "minmax", "observer_kwargs": {"averaging_constant": 0.01}, "actorder": "weight",
           "scale_dtype": None, "zp_dtype": "torch.int8"}  # fmt: skip
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None, "format": None}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
              "config_groups": {"group_0": GROUP}, "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.12.2",
              "global_compression_ratio": 1.5, "sparsity_config": {}, "transform_config": {}}  # fmt: skip


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "header",
    [
        {},
        {"checkpoint_format": "gptq"},
        {"checkpoint_format": "gptq_v2"},
        {"format": "GPTQ"},
        {"format": "gptq_v2", "method": "gptq"},
        {"checkpoint_format": "gptq", "format": "gptq_v2"},
        {"sym": False, "checkpoint_format": "gptq_v2"},
    ],
    ids=str,
)
def test_symmetric_zero_points_are_what_is_stored(stored: str, bits: int, header: dict, tmp_path: Path) -> None:
    """The values were made with the middle as zero point and stored as the packing defines; the header may say anything."""
    packing = Packing(stored, bits, 32)
    path = write(dataclasses.replace(LLAMA, packing=packing), tmp_path / "model")
    edit(path / "config.json", lambda c: c["quantization_config"].pop("checkpoint_format"))
    edit(path / "config.json", lambda c: c["quantization_config"].update(header))
    raw: dict = {}
    edit_tensors(path / "model.safetensors", lambda t: raw.update(t))
    expected = unpacked({n.rpartition(".")[2]: t for n, t in raw.items() if n.startswith(DOWN)}, packing)
    with open_model(path) as model:
        info = model.tensors["blk.0.ffn_down.weight"]
        assert info.format == f"Q{bits}_0"
        assert (np.asarray(unpack(model.read(info).reshape(expected.shape[0], -1), info.format)) == expected).all()


@pytest.mark.parametrize(
    "header",
    [{"checkpoint_format": "gptq"}, {"format": "gptq"}, {}, {"format": "gptq_v2", "checkpoint_format": "gptq"}],
    ids=str,
)
def test_other_zero_points_are_what_the_header_says(header: dict, tmp_path: Path) -> None:
    """`checkpoint_format` before `format`, as transformers has it; silence is from before there were two ways."""
    packing = Packing("gptq", 4, 32, symmetric=False)
    path = write(dataclasses.replace(LLAMA, packing=packing), tmp_path / "model")
    expected = {}
    for key, config in (("whole", {"checkpoint_format": "gptq"}), ("changed", header)):
        edit(path / "config.json", lambda c: c["quantization_config"].pop("checkpoint_format", None))
        edit(path / "config.json", lambda c, config=config: c["quantization_config"].update(config))
        with open_model(path) as model:
            expected[key] = model.read(model.tensors["blk.0.ffn_down.weight"])
    assert (expected["whole"] == expected["changed"]).all()
    edit(path / "config.json", lambda c: c["quantization_config"].update({"checkpoint_format": "gptq_v2"}))
    with open_model(path) as model:
        assert (model.read(model.tensors["blk.0.ffn_down.weight"]) != expected["whole"]).any()


@pytest.mark.parametrize(
    "content",
    [
        GPTQ, GPTQMODEL, AWQ, AWQ | {"format": "gemm", "method": "awq", "meta": {}, "lm_head": False, "desc_act": False},
        GPTQ | {"dataset": "c4", "tokenizer": None, "use_exllama": False, "exllama_config": {"version": 1}, "damp_percent": 0.1,
                "true_sequential": True, "static_groups": False, "model_name_or_path": "x", "model_seqlen": 2048},
        GPTQ | {"autoround_version": "0.2", "amp": True, "data_type": "int", "enable_minmax_tuning": True, "iters": 512,
                "enable_quanted_input": True, "gradient_accumulate_steps": 1, "lr": 0.002, "minmax_lr": 0.002, "nsamples": 512,
                "scale_dtype": "torch.float16", "seqlen": 512, "train_bs": 4, "low_gpu_mem_usage": True, "act_bits": 16},
        {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, COMPRESSED,
        COMPRESSED | {"sparsity_config": {"format": "dense", "targets": []}, "transform_config": {"config_groups": {}}},
        {key: value for key, value in COMPRESSED.items() if key != "format"}
        | {"config_groups": {"group_0": GROUP | {"format": "pack-quantized"}}},
    ],
)  # fmt: skip
def test_headers_that_are_read(content: dict) -> None:
    assert scheme_of(content, "here").bits == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GPTQ | {"rotation": "hadamard"}, "rotation: 'hadamard'"),
        (GPTQ | {"adapter": {"name": "lora", "rank": 64}}, "adapter: "),
        (GPTQ | {"pack_dtype": "int8"}, "pack_dtype: 'int8'"),
        (GPTQ | {"something_new": 1}, "something_new: 1"),
        (GPTQ | {"data_type": "mx_fp"}, "data_type: 'mx_fp'"),
        (GPTQ | {"act_bits": 8}, "act_bits: 8"),
        (GPTQ | {"super_bits": 6}, "super_bits: 6"),
        (GPTQ | {"format": "gptq_p"}, "format: 'gptq_p'"),
        (GPTQ | {"method": "qqq"}, "method: 'qqq'"),
        (AWQ | {"format": "gemv"}, "format: 'gemv'"),
        (AWQ | {"backend": "llm-awq"}, "backend: 'llm-awq'"),
        (AWQ | {"krot": 8}, "krot: 8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method: 'fp8'"),
        ({"group_size": 64, "bits": 4}, "quant_method: None"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: "),
        (COMPRESSED | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config: "),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: "),
        (COMPRESSED | {"a_new_key": True}, "a_new_key: True"),
        (COMPRESSED | {"config_groups": {"g": GROUP | {"a_new_key": True}}}, "a_new_key: True"),
        (COMPRESSED | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"dynamic": True}}}}, "dynamic: True"),
        (COMPRESSED | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"block_structure": "2:4"}}}}, "block_structure: "),
        (COMPRESSED | {"config_groups": {"g": GROUP | {"weights": WEIGHTS | {"a_new_key": 3}}}}, "a_new_key: 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_change_the_numbers_are_refused(content: dict, said: str) -> None:
    with pytest.raises(fj.UnsupportedModelError, match=rf"^here: key {said}"):
        scheme_of(content, "here")


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    for method in ("gptq", "awq", "compressed-tensors"):
        path = write(dataclasses.replace(LLAMA, packing=Packing(method, 4, 32)), tmp_path / method)
        suffix = "weight_scale" if method == "compressed-tensors" else "scales"
        edit_tensors(
            path / "model.safetensors",
            lambda t, name=f"{DOWN}.{suffix}": t.update({name: (*t[name][:2], t[name][2][:-2] + b"\x00\x7c")}),
        )
        with pytest.raises(fj.ModelFileError, match=rf"{DOWN}\.{suffix}: holds scales that are not finite"):
            open_model(path)
