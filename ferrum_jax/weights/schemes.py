"""`scheme_of`: what a quantization_config says about packed matrices.

The one idea is that of families/keys.py: every key is either read here, or says only how the quantized values were found and
not what they are, or is neutral; any other is refused by name, also inside groups.

Sources: AutoGPTQ and GPTQModel (`gptq` stores the zero point minus one, `gptq_v2` unchanged; GPTQModel 5 writes `format` and
`method` in addition to `checkpoint_format` and `quant_method`), AutoAWQ (`gemm`), and compressed-tensors' `pack-quantized`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families.keys import Keys, is_neutral, shown

SIZES = (128, 64, 32)  # weights per block, as in pallas_kernels.blocks.groups
# Keys about how the values were found, by which program, and how other programs should compute with them.
_FOUND = {
    "act_group_aware", "auto_forward_data_parallel", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "desc_act", "device", "disable_exllama", "do_fuse", "exllama_config",
    "fail_safe", "failsafe", "fallback", "foem", "fuse_max_seq_len", "gptaq", "hessian", "lm_head", "max_input_length", "meta",
    "mock_quantization", "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "modules_to_fuse", "modules_to_not_convert", "mse", "offload_to_disk",
    "offload_to_disk_path", "pack_impl", "pad_token_id", "parallel_packing", "static_groups", "sym", "tokenizer",
    "true_sequential", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha", "zero_point",
    # AutoRound's keys, when it writes the others' formats
    "amp", "autoround_version", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
    "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr", "not_use_best_mse", "nsamples", "provider",
    "quant_block_list", "scale_dtype", "seqlen", "to_quant_block_names", "train_bs",
}  # fmt: skip
_COMPRESSED = {
    "dequantize", "global_compression_ratio", "ignore", "quantization_status", "quant_method", "run_compressed",
    "use_optimized_inference", "version",
}  # fmt: skip
_REFUSED = "{} is not supported"
_OF_WEIGHTS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a checkpoint's matrices are packed. group_size: columns that share a scale, -1 for a whole row. zero_shift: is added
    to stored zero points. symmetric, ordered: what the file states; used only if the tensors cannot be read."""

    method: str
    bits: int
    group_size: int
    zero_shift: int
    symmetric: bool
    ordered: bool


class _Fields(Keys):
    def refuse(self, key: str, known: str) -> UnsupportedModelError:
        return self.unsupported(key, f"{shown(self.get(key))} is not supported; supported: {known}")

    def only(self, key: str, known: tuple[object, ...], text: str) -> None:
        """Refuses any value of the key that is not in `known`."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in known):
            raise self.refuse(key, text)


def scheme_of(content: Mapping[str, Any], where: str) -> Scheme:
    """The scheme that a quantization_config states; `where` names it in errors. UnsupportedModelError for other schemes."""
    keys = _Fields(content, "", where)
    method = keys.get("quant_method") or keys.get("method")
    if method is None and {"w_bit", "q_group_size"} <= content.keys():  # AutoAWQ's own file
        method = "awq"
    if method is None and {"bits", "group_size", "desc_act"} <= content.keys():  # AutoGPTQ's own file
        method = "gptq"
    if method == "compressed-tensors":
        return _compressed_tensors(keys)
    if method == "mxfp4":
        keys.ignore("dequantize", "modules_to_not_convert")
        keys.judge(_REFUSED)
        return Scheme("mxfp4", 4, 32, 0, True, False)
    if method not in ("gptq", "awq"):
        raise keys.refuse("quant_method", "gptq, awq, compressed-tensors, mxfp4")
    keys.only("method", (method,), method)
    bits_key, group_key = (
        ("bits" if keys.has("bits") else "w_bit"),
        ("group_size" if keys.has("group_size") else "q_group_size"),
    )
    bits, group = keys.get(bits_key), keys.get(group_key)
    supported = (4, 8) if method == "gptq" else (4,)
    if type(bits) is not int or bits not in supported:
        raise keys.refuse("bits" if bits is None else bits_key, ", ".join(map(str, supported)))
    if type(group) is not int or (group != -1 and (group < 1 or group % SIZES[-1])):
        raise keys.refuse("group_size" if group is None else group_key, f"-1 and multiples of {SIZES[-1]}")
    keys.only("pack_dtype", ("int32",), "int32")
    keys.only("data_type", ("int",), "int")
    keys.only("act_bits", (16,), "16")
    dynamic = keys.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(name).startswith("-:") for name in dynamic):
        raise keys.refuse("dynamic", "modules left out (-:)")
    if keys.get("is_marlin_format"):
        raise keys.unsupported("checkpoint_format", "'marlin' is not supported; supported: gptq, gptq_v2")
    known = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    stated = known[0]
    for key in ("version", "format", "checkpoint_format"):  # if they contradict each other, the last counts
        value = keys.get(key)
        if value is not None and (not isinstance(value, str) or value.lower() not in known):
            raise keys.refuse(key, ", ".join(known))
        stated = stated if value is None else value.lower()
    if method == "awq" and keys.get("backend") == "llm-awq":
        raise keys.refuse("backend", "those of gemm")
    keys.ignore(*_FOUND)
    keys.judge(_REFUSED)
    symmetric = content.get("zero_point") is False if method == "awq" else content.get("sym") is not False
    return Scheme(method, bits, group, int(stated == "gptq"), symmetric, method == "gptq" and content.get("desc_act") is True)


def _compressed_tensors(keys: _Fields) -> Scheme:
    groups = keys.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not all(isinstance(g, Mapping) for g in groups.values()):
        raise keys.refuse("config_groups", "one group")
    group = _Fields(next(iter(groups.values())), "", keys.source)
    place = group if group.get("format") else keys
    if place.get("format") != "pack-quantized":
        raise place.refuse("format", "pack-quantized")
    keys.ignore("format")
    for key in ("input_activations", "output_activations"):
        if group.has(key):
            raise group.refuse(key, "none")
    if keys.has("kv_cache_scheme"):
        raise keys.refuse("kv_cache_scheme", "none")
    if group.get("targets") != ["Linear"]:
        raise group.refuse("targets", "['Linear']")
    stated = group.get("weights")
    weights = _Fields(stated if isinstance(stated, Mapping) else {}, "", keys.source)
    bits = weights.get("num_bits")
    if weights.get("type") not in (None, "int") or type(bits) is not int or bits not in (4, 8):
        raise group.refuse("weights", "int of 4 or 8 bits")
    if weights.get("strategy") not in ("group", "channel"):
        raise weights.refuse("strategy", "group, channel")
    size = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    if type(size) is not int or (size != -1 and (size < 1 or size % SIZES[-1])):
        raise weights.refuse("group_size", f"-1 and multiples of {SIZES[-1]}")
    symmetric, ordered = weights.get("symmetric") is not False, weights.get("actorder") in ("group", True)
    weights.only("actorder", ("group", "weight", "static", "dynamic", True, False), "group, weight")
    weights.ignore("group_size", *_OF_WEIGHTS)
    weights.judge(_REFUSED)
    group.judge(_REFUSED)
    for key in ("sparsity_config", "transform_config"):  # {"format": "dense"} and {"config_groups": {}} mean none
        value = keys.get(key)
        if not is_neutral(value) and not (
            isinstance(value, Mapping)
            and (value.get("format") == "dense" if key == "sparsity_config" else not any(value.values()))
        ):
            raise keys.refuse(key, "none")
    keys.ignore(*_COMPRESSED)
    keys.judge(_REFUSED)
    return Scheme("compressed-tensors", bits, size, 0, symmetric, ordered)
