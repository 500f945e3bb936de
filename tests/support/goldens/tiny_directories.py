"""Tiny random checkpoint directories of every model class, the same bytes on every machine.

A directory is a function of its `Spec` alone, as the files of tiny_models are. Packed checkpoints are made from whole
numbers, scales and zero points, packed here as the formats' authors define it; `dense` gives the float32 matrices that they
stand for, which is what the golden numbers were made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.goldens.tiny_models import SPECIALS, bell, between, bytes_to_unicode, raw

MODEL_TYPES = {
    "GptOssForCausalLM": "gpt_oss",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
AWQ_PACKS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighboring columns is in the lowest, second, ... four bits


@dataclass(frozen=True)
class Packing:
    """How matrices of layers are packed; `method` "gptq", "gptq_v2", "awq", "compressed-tensors", or "mxfp4" of experts."""

    method: str
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    ordered: bool = False
    scales: str = "F16"
    own_file: bool = False  # quantize_config.json instead of a key of config.json


@dataclass(frozen=True)
class Spec:
    """What a tiny checkpoint is. `config` replaces or adds keys of config.json (None: drops)."""

    name: str
    model_class: str
    dtype: str = "BF16"
    layers: int = 3
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    ff: int = 512
    experts: int = 0
    top_k: int = 0
    expert_ff: int = 256
    dense: tuple[int, ...] = ()
    vocab: int = 320
    tied: bool = False
    shards: int = 1
    fused: bool = False  # experts as transformers 5 keeps them
    packing: Packing | None = None
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 1


def config_json(s: Spec) -> dict[str, Any]:
    """The content of config.json."""
    made: dict[str, Any] = {
        "architectures": [s.model_class],
        "model_type": MODEL_TYPES[s.model_class],
        "hidden_size": s.hidden,
        "intermediate_size": s.ff,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": s.tied,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[s.dtype],
        "bos_token_id": s.vocab - 4,
        "eos_token_id": s.vocab - 4,
        "initializer_range": 0.02,
        "use_cache": True,
        "transformers_version": "4.51.0",
    }
    if s.model_class == "MixtralForCausalLM":
        made |= {"num_local_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.expert_ff}
    elif s.model_class == "GptOssForCausalLM":
        yarn = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        made |= {"num_local_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.expert_ff}
        made |= {"attention_bias": True, "sliding_window": 24, "swiglu_limit": 7.0, "rope_theta": 150000.0}
        made["rope_scaling"] = yarn | {"original_max_position_embeddings": 512}
        made["layer_types"] = [("sliding_attention", "full_attention")[n % 2] for n in range(s.layers)]
    elif s.experts:
        made |= {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.expert_ff}
    if s.packing and not s.packing.own_file:
        made["quantization_config"] = quantization(s.packing)
    made |= s.config
    return {key: value for key, value in made.items() if value is not None or key == "sliding_window"}


def quantization(p: Packing) -> dict[str, Any]:
    """What a quantizer writes about its packing."""
    if p.method == "compressed-tensors":
        group = {"group_size": p.group_size, "strategy": "group"} if p.group_size > 0 else {"strategy": "channel"}
        weights = {"num_bits": p.bits, "type": "int", "symmetric": p.symmetric, "dynamic": False} | group
        weights["actorder"] = "group" if p.ordered else None
        entry = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": p.method, "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": entry}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        }  # fmt: skip
    if p.method == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    if p.method == "awq":
        made = {"bits": p.bits, "group_size": p.group_size, "version": "gemm", "zero_point": not p.symmetric}
        return {"quant_method": "awq"} | made
    made = {"bits": p.bits, "group_size": p.group_size, "desc_act": p.ordered, "sym": p.symmetric, "damp_percent": 0.01}
    made["checkpoint_format"] = p.method
    return made if p.own_file else made | {"quant_method": "gptq"}


def matrices(s: Spec) -> Iterator[tuple[str, tuple[int, int], float]]:
    """The matrices of the layers that a quantizer packs: module, shape, standard deviation."""
    h, root = s.hidden, 1 / math.sqrt(s.hidden)
    for n in range(s.layers):
        b = f"model.layers.{n}."
        yield b + "self_attn.q_proj", (s.heads * s.head_dim, h), 1.3 * root
        yield b + "self_attn.k_proj", (s.kv_heads * s.head_dim, h), 1.3 * root
        yield b + "self_attn.v_proj", (s.kv_heads * s.head_dim, h), root
        yield b + "self_attn.o_proj", (h, s.heads * s.head_dim), 1.2 / math.sqrt(s.heads * s.head_dim)
        mixtral = s.model_class == "MixtralForCausalLM"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        inner = ("block_sparse_moe" if mixtral else "mlp") + "."
        sparse = s.experts and n not in s.dense
        ff = s.expert_ff if sparse else s.ff
        if s.model_class == "GptOssForCausalLM":
            continue  # see gpt_oss
        for module in [f"{inner}experts.{e}." for e in range(s.experts)] if sparse else ["mlp."]:
            yield b + module + names[0], (ff, h), 1.3 * root
            yield b + module + names[1], (ff, h), 1.3 * root
            yield b + module + names[2], (h, ff), 1.5 / math.sqrt(ff)


def plain(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """Everything else: name and float32 values."""
    h, root = s.hidden, 1 / math.sqrt(s.hidden)

    def values(name: str, shape: tuple[int, ...], std: float) -> tuple[str, np.ndarray]:
        made = bell(s.seed, name, shape) * np.float32(std)
        if name == ("model.embed_tokens.weight" if s.tied else "lm_head.weight"):
            made[-len(SPECIALS) :] /= np.float32(16)  # so that greedy decoding never takes one
        return name, made

    yield values("model.embed_tokens.weight", (s.vocab, h), 2.8 * root if s.tied else 0.05)
    yield "model.norm.weight", between(s.seed, "model.norm", (h,), 0.4, 1.6)
    if not s.tied:
        yield values("lm_head.weight", (s.vocab, h), 2.8 * root)
    config = config_json(s)
    biased = {"q_proj", "k_proj", "v_proj"} if s.model_class == "Qwen2ForCausalLM" or config.get("attention_bias") else set()
    biased |= {"o_proj"} if config.get("attention_bias") else set()
    biased |= {"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set()
    for module, shape, _ in matrices(s):
        if module.rpartition(".")[2] in biased:
            yield values(module + ".bias", shape[:1], 0.5)
    for n in range(s.layers):
        b = f"model.layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield b + name + ".weight", between(s.seed, b + name, (h,), 0.4, 1.6)
        if s.model_class.startswith("Qwen3"):
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                yield b + name + ".weight", between(s.seed, b + name, (s.head_dim,), 0.5, 2.0)
        if s.model_class == "GptOssForCausalLM":
            continue
        if s.experts and n not in s.dense:
            gate = "block_sparse_moe.gate" if s.model_class == "MixtralForCausalLM" else "mlp.gate"
            yield values(b + gate + ".weight", (s.experts, h), 1.5 * root)


def gpt_oss(s: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """What is this class's own: sinks, the router and experts, whose rows of gate and up lie in turn and reach beyond the
    limit. Rows of numbers come last; blocks of MXFP4 have them first."""
    h, ff, root = s.hidden, s.expert_ff, 1 / math.sqrt(s.hidden)

    def plain(name: str, shape: tuple[int, ...], std: float) -> tuple[str, np.ndarray, str]:
        return name, bell(s.seed, name, shape) * np.float32(std), s.dtype

    for n in range(s.layers):
        b = f"model.layers.{n}."
        yield plain(b + "self_attn.sinks", (s.heads,), 2.0)
        yield plain(b + "mlp.router.weight", (s.experts, h), 1.5 * root)
        yield plain(b + "mlp.router.bias", (s.experts,), 0.5)
        for name, rows, columns, std in (("gate_up_proj", 2 * ff, h, 4 * root), ("down_proj", h, ff, 0.4 / math.sqrt(ff))):
            name = f"{b}mlp.experts.{name}"
            yield plain(name + "_bias", (s.experts, rows), 0.5)
            if not s.packing:
                yield plain(name, (s.experts, columns, rows), std)
                continue
            count = s.experts * rows * columns // 32
            codes = raw(s.seed, name, 2 * count).astype("<u8").view(np.uint8).reshape(s.experts, rows, columns // 32, 16)
            middle = np.uint64(127 + round(math.log2(std / 2.93)))
            scales = (middle - 1 + raw(s.seed, name + "/scale", count) % np.uint64(3)).astype(np.uint8)
            yield name + "_blocks", codes, "U8"
            yield name + "_scales", scales.reshape(codes.shape[:3]), "U8"


@dataclass(frozen=True)
class Numbers:
    """A packed matrix as numbers: codes uint8 [rows, columns], scales float32 and zeros int32 [rows, groups], the group of
    each column int32 [columns]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray

    def dense(self) -> np.ndarray:
        """float32 [rows, columns]."""
        return self.scales[:, self.group] * (self.codes.astype(np.int32) - self.zeros[:, self.group]).astype(np.float32)


def numbers(s: Spec, module: str, shape: tuple[int, int], std: float) -> Numbers:
    """Random numbers of a matrix whose weights have about that standard deviation."""
    p, (rows, columns) = s.packing, shape
    assert p is not None
    size = columns if p.group_size == -1 else p.group_size
    groups, top = columns // size, 1 << p.bits
    codes = (raw(s.seed, module, rows * columns) % np.uint64(top)).astype(np.uint8).reshape(shape)
    spread = np.float32(std / (0.29 * top))
    scales = rounded(between(s.seed, module + "/scale", (rows, groups), 0.5, 1.5) * spread, p.scales)
    middle = np.full((rows, groups), top // 2, np.int32)
    dice = raw(s.seed, module + "/zero", rows * groups).reshape(rows, groups)
    zeros = middle if p.symmetric else middle + (dice % np.uint64(top // 2)).astype(np.int32) - top // 4
    group = np.arange(columns) // size
    if p.ordered and groups > 1:
        group = group[np.argsort(raw(s.seed, module + "/order", columns), kind="stable")]
    return Numbers(codes, scales, zeros, group.astype(np.int32))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype has exactly."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if dtype == "BF16" else values


def words(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """int32: runs of 32 / bits numbers along the last axis in one word, `places[i]` of a run in the i-th lowest bits."""
    each = 32 // bits
    runs = codes.reshape(*codes.shape[:-1], -1, each).astype(np.uint32)[..., list(places or range(each))]
    return (runs << (np.arange(each, dtype=np.uint32) * np.uint32(bits))).sum(-1, dtype=np.uint32).view(np.int32)


def packed(s: Spec, module: str, n: Numbers) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors of a packed matrix: name to (array, dtype)."""
    p = s.packing
    assert p is not None
    if p.method == "compressed-tensors":
        made = {
            "weight_packed": (words(n.codes, p.bits), "I32"),
            "weight_scale": (n.scales, p.scales),
            "weight_shape": (np.array(n.codes.shape, np.int64), "I64"),
        }
        if not p.symmetric:
            rows = -(-n.zeros.shape[0] // (32 // p.bits)) * (32 // p.bits)
            padded = np.pad(n.zeros, ((0, rows - n.zeros.shape[0]), (0, 0)))
            made["weight_zero_point"] = (words(np.ascontiguousarray(padded.T), p.bits).T, "I32")
        if p.ordered:
            made["weight_g_idx"] = (n.group, "I32")
    else:
        awq = p.method == "awq"
        stored = n.zeros - (1 if p.method == "gptq" else 0)
        along = words(n.codes.T, 4, AWQ_PACKS) if awq else words(n.codes, p.bits).T
        made = {
            "qweight": (along, "I32"),
            "qzeros": (words(stored.T, p.bits, AWQ_PACKS if awq else None), "I32"),
            "scales": (n.scales.T, p.scales),
        }
        if not awq:
            made["g_idx"] = (n.group, "I32")
    return {f"{module}.{suffix}": value for suffix, value in made.items()}


def tensors(s: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of the checkpoint: name, values, dtype."""
    for name, values in plain(s):
        yield name, values, s.dtype
    if s.model_class == "GptOssForCausalLM":
        yield from gpt_oss(s)
    fused: dict[str, list[np.ndarray]] = {}
    for module, shape, std in matrices(s):
        if s.packing and s.packing.method != "mxfp4":
            for name, (values, dtype) in packed(s, module, numbers(s, module, shape, std)).items():
                yield name, values, dtype
            continue
        values = bell(s.seed, module, shape) * np.float32(std)
        if s.fused and ".experts." in module:
            stem, kind = module.partition(".experts.")[0] + ".experts.", module.rpartition(".")[2]
            fused.setdefault(stem + ("down_proj" if kind == "down_proj" else "gate_up_proj"), []).append(values)
        else:
            yield module + ".weight", values, s.dtype
    for name, parts in fused.items():
        stacked = np.stack(parts)  # gate_up_proj: gate 0, up 0, gate 1, ...
        yield name, stacked.reshape(s.experts, -1, stacked.shape[-1]), s.dtype


def dense(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """What the tensors stand for: name and float32 values, matrices unpacked, as a checkpoint that is not packed has them."""
    for name, values in plain(s):
        yield name, from_bytes(to_bytes(values, s.dtype), s.dtype).reshape(values.shape)
    for module, shape, std in matrices(s):
        if s.packing:
            yield module + ".weight", numbers(s, module, shape, std).dense()
        else:
            values = bell(s.seed, module, shape) * np.float32(std)
            yield module + ".weight", from_bytes(to_bytes(values, s.dtype), s.dtype).reshape(shape)


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """Little-endian numbers of that dtype; float32 is cut to bfloat16."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    kinds = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1", "I8": "i1"}
    return np.ascontiguousarray(values).astype(kinds[dtype]).tobytes()


def from_bytes(data: bytes, dtype: str) -> np.ndarray:
    """The float32 values of such bytes."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def safetensors(entries: list[tuple[str, str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of (name, dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, data in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in entries)


def tokenizer_json(vocab: int) -> dict[str, Any]:
    """A byte-level BPE whose last tokens are `SPECIALS`."""
    letters = bytes_to_unicode()
    pairs = [(a, b) for a in "etaoinsh" for b in "etaoinsh"][: vocab - 256 - len(SPECIALS)]
    tokens = [*letters, *(a + b for a, b in pairs)]
    tokens += [f"<|extra_{i}|>" for i in range(vocab - len(tokens) - len(SPECIALS))]
    added = [
        {"id": vocab - len(SPECIALS) + i, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in enumerate(SPECIALS)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [f"{a} {b}" for a, b in pairs],
        },
    }  # fmt: skip


def write(s: Spec, path: Path) -> str:
    """Write the directory and return its digest: sha256 over every tensor's name, dtype, shape and bytes."""
    path.mkdir(parents=True, exist_ok=True)
    entries = [(name, dtype, values.shape, to_bytes(values, dtype)) for name, values, dtype in tensors(s)]
    digest = hashlib.sha256()
    for name, dtype, shape, data in entries:
        digest.update(f"{name} {dtype} {shape}".encode() + data)
    if s.shards == 1:
        (path / "model.safetensors").write_bytes(safetensors(entries))
    else:
        places = {}
        for i in range(s.shards):
            name = f"model-{i + 1:05d}-of-{s.shards:05d}.safetensors"
            (path / name).write_bytes(safetensors(entries[i :: s.shards]))
            places |= {entry[0]: name for entry in entries[i :: s.shards]}
        index = {"metadata": {"total_size": sum(len(entry[3]) for entry in entries)}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if s.packing and s.packing.own_file:
        (path / "quantize_config.json").write_text(json.dumps(quantization(s.packing)))
    (path / "config.json").write_text(json.dumps(config_json(s), indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab)))
    names = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[3], "bos_token": None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [s.vocab - 2, s.vocab - 4]}))
    return digest.hexdigest()


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
