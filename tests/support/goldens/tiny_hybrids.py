"""Tiny random models of layers that recur by a gated delta net and layers that attend, as directories and as GGUF files.

The directory of a `Spec` is what transformers reads. The GGUF file holds the same numbers, changed as llama.cpp's converter
changes them: norms with 1 added, -exp(A_log), and by family other places of heads. The directory has what the blocks of
quantized matrices stand for: those in Q8_0 are rounded first; those of a mix are made for the GGUF file, and each number goes
to the place in the directory that it came from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support import GOLDENS
from support.goldens.tiny_directories import TEMPLATE, safetensors, to_bytes, tokenizer_json
from support.goldens.tiny_models import RANDOM_BLOCKS, SPECIALS, add_tokenizer, bell, between, random_blocks

HERE = GOLDENS / "hybrids"
LENGTHS = (1, 17, 130, 1000)
CLASSES = {
    "qwen35": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    "qwen3next": ("Qwen3NextForCausalLM", "qwen3_next"),
}


@dataclass(frozen=True)
class Spec:
    """What a tiny model is. format: of its matrices in the GGUF file, F32 or Q8_0; mix: instead, formats by stem ("*" for the
    rest), taken in turn by layer."""

    name: str
    arch: str
    attends: tuple[int, ...] = (3,)
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    key_heads: int = 2
    value_heads: int = 6
    state: int = 32
    taps: int = 4
    ff: int = 192
    experts: int = 0
    top_k: int = 3
    expert_ff: int = 64
    shared_ff: int = 96
    vocab: int = 320
    tied: bool = False
    eps: float = 1e-5
    theta: float = 1e4
    format: str = "F32"
    mix: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 1

    def format_of(self, name: str) -> str:
        """The format of a tensor of the GGUF file."""
        if name.endswith(PLAIN):
            return "F32"
        if not self.mix:
            return self.format
        *lead, stem, _ = name.split(".")
        formats = self.mix.get(stem, self.mix["*"])
        return formats[int(lead[1]) % len(formats) if lead else 0]

    @property
    def per_key(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads


# What llama.cpp's Q4_K_M gives these models (npm @node-llama-cpp/linux-x64 3.22.1). Rows that are no multiple of 256 have Q5_0
# and Q8_0 in place of Q4_K and Q6_K; with 8 experts keys, values and the delta net's matrix have more bits.
NARROW = {"ssm_out": ("Q5_0",), "ffn_down_exps": ("Q5_0", "Q5_0", "Q8_0"), "ffn_down_shexp": ("Q5_0", "Q5_0", "Q8_0")}
MIX = {"*": ("Q4_K",), "output": ("Q6_K",), "attn_qkv": ("Q4_K", "Q4_K", "Q6_K"), **NARROW}
MIX_OF_8 = MIX | {"attn_qkv": ("Q8_0",), "attn_k": ("Q8_0",), "attn_v": ("Q8_0",), "attn_output": ("Q5_K",)}
WIDE = {"hidden": 256, "layers": 3, "attends": (1,), "expert_ff": 96}
CASES = [
    Spec("qwen35", "qwen35", tied=True, seed=71),
    Spec("qwen35-same-heads-q8_0", "qwen35", attends=(1,), layers=3, key_heads=4, value_heads=4, format="Q8_0", seed=72),
    Spec("qwen35moe", "qwen35moe", experts=8, seed=73),
    Spec("qwen35moe-q8_0", "qwen35moe", attends=(0, 2), layers=3, experts=8, taps=3, format="Q8_0", seed=74),
    Spec("qwen3next", "qwen3next", experts=8, seed=75),
    Spec("qwen3next-q8_0", "qwen3next", layers=5, attends=(3,), experts=8, value_heads=4, format="Q8_0", seed=76),
    Spec("qwen35moe-q4_k_m", "qwen35moe", experts=8, **WIDE, mix=MIX_OF_8, seed=77),
    Spec("qwen3next-q4_k_m", "qwen3next", experts=12, **WIDE, mix=MIX, seed=78),
]


def config_json(s: Spec) -> dict[str, Any]:
    """The content of config.json."""
    model_class, model_type = CLASSES[s.arch]
    made: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": model_type,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": s.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": s.tied,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": s.vocab - 4,
        "attn_output_gate": True,
        "layer_types": ["full_attention" if n in s.attends else "linear_attention" for n in range(s.layers)],
        "linear_conv_kernel_dim": s.taps,
        "linear_key_head_dim": s.state,
        "linear_value_head_dim": s.state,
        "linear_num_key_heads": s.key_heads,
        "linear_num_value_heads": s.value_heads,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
    }
    if s.arch == "qwen3next":
        made |= {"rope_theta": s.theta, "rope_scaling": None, "partial_rotary_factor": 0.25}
        made |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "intermediate_size": s.ff}
    else:
        rope = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": s.theta}
        made["rope_parameters"] = rope | {"partial_rotary_factor": 0.25}
    if s.experts:
        made |= {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.expert_ff}
        made["shared_expert_intermediate_size"] = s.shared_ff
    else:
        made["intermediate_size"] = s.ff
    return made


def rounded(values: np.ndarray, format: str) -> np.ndarray:
    """float32 values that a matrix in this format has exactly."""
    if format == "F32":
        return values
    kind = gguf.GGMLQuantizationType[format]
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def tensors(s: Spec) -> list[tuple[str, np.ndarray]]:
    """The tensors of the directory: name and float32 values."""
    found = list(drawn(s))
    if not s.mix:
        return found
    ends = np.cumsum([0, *(values.size for _, values in found)])
    numbers = [(name, np.arange(ends[i], ends[i + 1]).reshape(values.shape)) for i, (name, values) in enumerate(found)]
    flat = np.concatenate([values.reshape(-1) for _, values in found])
    with np.errstate(over="ignore"):
        places = dict(as_gguf(s, numbers))
    for name, array, kind in stored(s):
        if kind != "F32":
            flat[places[name].reshape(-1)] = gguf.quants.dequantize(array, gguf.GGMLQuantizationType[kind]).reshape(-1)
    return [(name, flat[ends[i] : ends[i + 1]].reshape(values.shape)) for i, (name, values) in enumerate(found)]


def drawn(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """The same before those of a mix are quantized."""
    h, root = s.hidden, 1 / math.sqrt(s.hidden)

    def matrix(name: str, shape: tuple[int, ...], std: float) -> tuple[str, np.ndarray]:
        values = bell(s.seed, name, shape) * np.float32(std)
        if name == ("model.embed_tokens.weight" if s.tied else "lm_head.weight"):
            values[-len(SPECIALS) :] /= np.float32(16)  # so that greedy decoding never takes one
        return name, rounded(values, s.format)

    def plain(name: str, shape: tuple[int, ...], low: float, high: float) -> tuple[str, np.ndarray]:
        return name, between(s.seed, name, shape, low, high)

    yield matrix("model.embed_tokens.weight", (s.vocab, h), 2.8 * root if s.tied else 0.05)
    yield plain("model.norm.weight", (h,), -0.6, 0.6)
    if not s.tied:
        yield matrix("lm_head.weight", (s.vocab, h), 2.8 * root)
    values = s.value_heads * s.state
    channels = 2 * s.key_heads * s.state + values
    for n in range(s.layers):
        b = f"model.layers.{n}."
        yield plain(b + "input_layernorm.weight", (h,), -0.6, 0.6)
        yield plain(b + "post_attention_layernorm.weight", (h,), -0.6, 0.6)
        if n in s.attends:
            yield matrix(b + "self_attn.q_proj.weight", (2 * s.heads * s.head_dim, h), 1.3 * root)
            yield matrix(b + "self_attn.k_proj.weight", (s.kv_heads * s.head_dim, h), 1.3 * root)
            yield matrix(b + "self_attn.v_proj.weight", (s.kv_heads * s.head_dim, h), root)
            yield matrix(b + "self_attn.o_proj.weight", (h, s.heads * s.head_dim), 2.4 / math.sqrt(s.heads * s.head_dim))
            yield plain(b + "self_attn.q_norm.weight", (s.head_dim,), -0.5, 1.0)
            yield plain(b + "self_attn.k_norm.weight", (s.head_dim,), -0.5, 1.0)
        else:
            a = b + "linear_attn."
            if s.arch == "qwen3next":
                yield matrix(a + "in_proj_qkvz.weight", (channels + values, h), 1.3 * root)
                yield matrix(a + "in_proj_ba.weight", (2 * s.value_heads, h), 1.5 * root)
            else:
                yield matrix(a + "in_proj_qkv.weight", (channels, h), 1.3 * root)
                yield matrix(a + "in_proj_z.weight", (values, h), 1.3 * root)
                yield matrix(a + "in_proj_b.weight", (s.value_heads, h), 1.5 * root)
                yield matrix(a + "in_proj_a.weight", (s.value_heads, h), 1.5 * root)
            yield plain(a + "conv1d.weight", (channels, 1, s.taps), -1.0, 1.0)
            yield plain(a + "A_log", (s.value_heads,), -3.0, 1.5)
            yield plain(a + "dt_bias", (s.value_heads,), -3.0, 1.0)
            yield plain(a + "norm.weight", (s.state,), 0.4, 1.6)
            yield matrix(a + "out_proj.weight", (h, values), 1.5 / math.sqrt(values))
        modules = [("mlp.", s.ff)]
        if s.experts:
            yield plain(b + "mlp.gate.weight", (s.experts, h), -2.5 * root, 2.5 * root)
            yield plain(b + "mlp.shared_expert_gate.weight", (1, h), -3 * root, 3 * root)
            modules = [(f"mlp.experts.{e}.", s.expert_ff) for e in range(s.experts)] + [("mlp.shared_expert.", s.shared_ff)]
        for module, ff in modules:
            yield matrix(b + module + "gate_proj.weight", (ff, h), 1.3 * root)
            yield matrix(b + module + "up_proj.weight", (ff, h), 1.3 * root)
            yield matrix(b + module + "down_proj.weight", (h, ff), 1.5 / math.sqrt(ff))


def write_directory(s: Spec, path: Path, *, pictures: bool = False) -> str:
    """Writes the directory and returns the digest of its tensors. pictures: as the model of texts and pictures is published,
    with tensors of vision and of multi-token prediction."""
    path.mkdir(parents=True, exist_ok=True)
    found, config, digest = list(tensors(s)), config_json(s), hashlib.sha256()
    for name, values in found:
        digest.update(f"{name} {values.shape}".encode() + values.tobytes())
    if pictures:
        model_class, model_type = config.pop("architectures")[0], config["model_type"]
        config = {
            "architectures": [model_class.replace("ForCausalLM", "ForConditionalGeneration")],
            "model_type": model_type.removesuffix("_text"),
            "text_config": config,
            "vision_config": {"depth": 1, "model_type": model_type.removesuffix("_text")},
            "image_token_id": 5,
            "tie_word_embeddings": s.tied,
        }
        found = [(name.replace("model.", "model.language_model.", 1), values) for name, values in found]
        found += [("model.visual.patch_embed.proj.weight", np.ones((3, 2, 2), np.float32))]
        found += [("mtp.layers.0.mlp.gate.weight", np.ones((3, 2), np.float32)), ("mtp.norm.weight", np.ones(3, np.float32))]
    entries = [(name, "F32", values.shape, to_bytes(values, "F32")) for name, values in found]
    (path / "model.safetensors").write_bytes(safetensors(entries))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab)))
    names = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[3], "bos_token": None}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return digest.hexdigest()


# ---- adapters

RANK = 4
WITH_ADAPTER = ("qwen35", "qwen35moe", "qwen3next")
ADAPTED = ("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight", "in_proj_qkvz.weight", "in_proj_ba.weight", "_b.weight",
           "_a.weight")  # fmt: skip


def factors(s: Spec) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """A and B of every projection but those of experts: its module, float32 [RANK, in] and [out, RANK]."""
    for name, values in tensors(s):
        if name.endswith(ADAPTED) and ".experts." not in name:
            rows, columns = values.shape
            a, b = (bell(s.seed, f"{name} {x}", shape) for x, shape in (("A", (RANK, columns)), ("B", (rows, RANK))))
            yield name.removesuffix(".weight"), a * np.float32(0.2), b * np.float32(0.2)


def write_adapter(s: Spec, path: Path) -> None:
    """Writes a LoRA adapter of all projections as PEFT does; alpha / rank is 2."""
    path.mkdir(parents=True)
    made, modules = [], set()
    for module, a, b in factors(s):
        modules.add(module.rpartition(".")[2])
        for letter, values in (("A", a), ("B", b)):
            made.append((f"base_model.model.{module}.lora_{letter}.weight", "F32", values.shape, to_bytes(values, "F32")))
    (path / "adapter_model.safetensors").write_bytes(safetensors(made))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(modules)}))


# ---- GGUF

MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiled(s: Spec, values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Value heads from grouped by key head to tiled, along an axis that has only those."""
    moved = np.moveaxis(values, axis, 0)
    parts = moved.reshape(s.key_heads, s.per_key, -1, *moved.shape[1:])
    return np.ascontiguousarray(np.moveaxis(parts.swapaxes(0, 1).reshape(moved.shape), 0, axis))


def of_gguf(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """The values of the tensors of the GGUF file."""
    return as_gguf(s, tensors(s))


def stored(s: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of the GGUF file: name, float32 or bytes, format."""
    for name, values in as_gguf(s, drawn(s)):
        kind, std = s.format_of(name), 1.4 / math.sqrt(values.shape[-1])
        if kind == "F32":
            yield name, values.astype(np.float32), kind
        elif kind in RANDOM_BLOCKS:
            std = {"token_embd.weight": 0.05, "output.weight": 2 * std}.get(name, std)
            quiet = len(SPECIALS) if name == ("token_embd.weight" if s.tied else "output.weight") else 0
            yield name, random_blocks(s.seed, name, values.shape, kind, std, quiet), kind
        else:
            yield name, gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]), kind


def as_gguf(s: Spec, found: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory as llama.cpp's converter changes them."""
    experts: dict[str, list[np.ndarray]] = {}
    queries = 2 * s.key_heads * s.state
    for name, values in found:
        module, _, suffix = name.rpartition(".")
        if module in WHOLE:
            yield f"{WHOLE[module]}.weight", values + 1 if module == "model.norm" else values
            continue
        _, _, number, inner = module.split(".", 3)
        b = f"blk.{number}."
        if ".experts." in name:
            experts.setdefault(f"{b}ffn_{name.split('.')[-2].removesuffix('_proj')}_exps.weight", []).append(values)
            continue
        if inner == "linear_attn.in_proj_qkvz":
            per = s.per_key * s.state
            parts = np.split(values.reshape(s.key_heads, -1, s.hidden), [s.state, 2 * s.state, 2 * s.state + per], axis=1)
            q, k, v, z = (part.reshape(-1, s.hidden) for part in parts)
            yield b + "attn_qkv.weight", np.concatenate([q, k, v])
            yield b + "attn_gate.weight", z
            continue
        if name.endswith("norm.weight") and inner != "linear_attn.norm":
            values = values + 1
        if suffix == "A_log":
            values = -np.exp(values)
        if inner in ("linear_attn.conv1d", "mlp.shared_expert_gate"):
            values = values.squeeze(axis=1 if "conv1d" in inner else 0)
        if s.arch != "qwen3next" and "linear_attn" in name and inner != "linear_attn.norm":
            if inner in ("linear_attn.in_proj_qkv", "linear_attn.conv1d"):
                values = np.concatenate([values[:queries], tiled(s, values[queries:])])
            else:
                values = tiled(s, values, 1 if inner == "linear_attn.out_proj" else 0)
        known = {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}
        yield b + (known[suffix] if suffix in known else f"{MODULES[inner]}.{suffix}"), values
    for name, parts in experts.items():
        yield name, np.stack(parts)


PLAIN = ("norm.weight", "ssm_conv1d.weight", "ssm_a", "bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def joined(s: Spec, found: list[tuple[str, np.ndarray, str]]) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors with gate and up of all experts in one, and those of Qwen3-Next that older files have in one."""
    known = {name: array for name, array, _ in found}
    for name, array, kind in found:
        if "ffn_gate_exps" in name:
            yield name.replace("gate", "gate_up"), np.concatenate([array, known[name.replace("gate", "up")]], axis=1), kind
        elif name.endswith("attn_qkv.weight") and s.arch == "qwen3next":
            parts = [*np.split(array, [s.key_heads * s.state, 2 * s.key_heads * s.state]), known[name.replace("qkv", "gate")]]
            rows = np.concatenate([part.reshape(s.key_heads, -1, array.shape[1]) for part in parts], axis=1)
            yield name.replace("attn_qkv", "ssm_in"), rows.reshape(-1, array.shape[1]), kind
        elif "ffn_up_exps" not in name and not (name.endswith("attn_gate.weight") and s.arch == "qwen3next"):
            yield name, array, kind


def write_gguf(s: Spec, path: Path, *, nextn: bool = False, list_of_layers: bool = True, join: bool = False) -> None:
    """Writes the GGUF file. nextn: with a block of multi-token prediction after the layers; list_of_layers: whether it says
    of each layer whether it recurs; join: as `joined` says."""
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(s.name)
    w.add_block_count(s.layers + nextn)
    w.add_context_length(2048)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.ff)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_rope_dimension_count(s.head_dim // 4)
    if s.arch != "qwen3next":
        w.add_rope_dimension_sections([3, 3, 2, 0])
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.theta)
    w.add_file_type(0)
    w.add_ssm_conv_kernel(s.taps)
    w.add_ssm_state_size(s.state)
    w.add_ssm_group_count(s.key_heads)
    w.add_ssm_time_step_rank(s.value_heads)
    w.add_ssm_inner_size(s.value_heads * s.state)
    w.add_uint32(f"{s.arch}.full_attention_interval", 4)
    if list_of_layers:
        w.add_array(
            f"{s.arch}.attention.recurrent_layers", [n < s.layers and n not in s.attends for n in range(s.layers + nextn)]
        )
    if s.experts:
        w.add_expert_count(s.experts)
        w.add_expert_used_count(s.top_k)
        w.add_expert_feed_forward_length(s.expert_ff)
        w.add_expert_shared_feed_forward_length(s.shared_ff)
    add_tokenizer(w, s.vocab)
    found = list(stored(s))
    if nextn:
        w.add_uint32(f"{s.arch}.nextn_predict_layers", 1)
        last, extra = f"blk.{s.attends[-1]}.", f"blk.{s.layers}."
        found += [(name.replace(last, extra), *rest) for name, *rest in found if name.startswith(last)]
        found += [(f"{extra}nextn.eh_proj.weight", np.ones((s.hidden, 2 * s.hidden), np.float32), "F32")]
        found += [(f"{extra}nextn.enorm.weight", np.ones(s.hidden, np.float32), "F32")]
    for name, array, kind in joined(s, found) if join else found:
        w.add_tensor(name, array, raw_dtype=None if kind == "F32" else gguf.GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
