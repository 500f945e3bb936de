"""Tiny random models with attention over latent vectors, as GGUF files and as directories.

The GGUF file of a `Spec` is as llama.cpp's converter writes it: one tensor for the keys of all heads, transposed, and one for
their values. The directory holds the numbers that its blocks stand for, in the tensors of transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support import GOLDENS
from support.goldens.tiny_directories import TEMPLATE, safetensors, to_bytes, tokenizer_json
from support.goldens.tiny_models import SPECIALS, add_tokenizer, bell, between, matrix

HERE = GOLDENS / "latent"
LENGTHS = (1, 17, 130, 1000)
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}


@dataclass(frozen=True)
class Spec:
    """What a tiny model is. yarn: factor, original context and mscale; formats: of matrices in the GGUF file by the part of the
    name after the layer, "*" for the rest, taken in turn by layer."""

    name: str
    kind: str
    layers: int = 3
    dense: int = 1
    hidden: int = 128
    heads: int = 4
    nope: int = 32
    rope: int = 16
    values: int = 48
    query_width: int = 64
    width: int = 64
    ff: int = 192
    experts: int = 8
    top_k: int = 3
    groups: int = 1
    groups_used: int = 1
    expert_ff: int = 64
    shared: int = 1
    scale: float = 1.0
    yarn: tuple[float, int, float] | None = None
    vocab: int = 320
    eps: float = 1e-5
    theta: float = 1e4
    formats: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 1
    tied: bool = False

    def format_of(self, part: str, layer: int) -> str:
        """The ggml type of a matrix."""
        names = self.formats.get(part, self.formats.get("*", ("F32",)))
        return names[layer % len(names)]

    @property
    def context(self) -> int:
        """The number of positions."""
        return int(self.yarn[0] * self.yarn[1]) if self.yarn else 2048

    @property
    def normalized(self) -> bool:
        """Whether the weights of a token's experts have the sum 1 before the scale."""
        return self.kind != "deepseek_v2"


GROUPS = {"groups": 4, "groups_used": 2}
Q8_0 = {"*": ("Q8_0",)}
# What llama.cpp's Q4_K_M does where rows fill blocks of 256: the rows of keys by head do not.
MIX = {
    "*": ("Q4_K",),
    "attn_k_b": ("Q5_0", "Q8_0"),
    "attn_v_b": ("Q6_K", "Q4_K"),
    "ffn_down": ("Q6_K",),
    "ffn_down_exps": ("Q4_K", "Q6_K", "Q4_K"),
    "output": ("Q6_K",),
}
WIDE = {"hidden": 256, "query_width": 256, "width": 256, "rope": 32, "values": 64, "ff": 256, "expert_ff": 256}
CASES = [
    Spec("deepseek3", "deepseek_v3", **GROUPS, scale=2.5, yarn=(8.0, 128, 1.0), seed=81),
    Spec("deepseek3-q8_0", "deepseek_v3", layers=2, query_width=0, yarn=(4.0, 256, 0.7), formats=Q8_0, seed=82),
    Spec("deepseek3-q4_k_m", "deepseek_v3", **WIDE, **GROUPS, scale=2.5, yarn=(8.0, 128, 1.0), formats=MIX, seed=83),
    Spec("deepseek2", "deepseek_v2", **GROUPS, shared=2, scale=4.0, yarn=(8.0, 128, 0.707), seed=84),
    Spec("deepseek2-lite-q8_0", "deepseek_v2", layers=2, query_width=0, shared=2, formats=Q8_0, seed=85),
    Spec("glm4-lite", "glm4_moe_lite", layers=2, nope=24, values=40, scale=1.8, theta=1e6, seed=86),
    Spec("glm4-lite-q8_0", "glm4_moe_lite", layers=2, scale=1.8, theta=1e6, formats=Q8_0, seed=87),
]


# ---- GGUF


def stored(s: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of the GGUF file: name, array as gguf's writer takes it, ggml type."""
    root, key = 1 / math.sqrt(s.hidden), s.nope + s.rope

    def weight(name: str, shape: tuple[int, ...], std: float) -> tuple[str, np.ndarray, str]:
        layer, part = (int(name.split(".")[1]), name.split(".")[2]) if name.startswith("blk") else (0, name.split(".")[0])
        return name, *matrix(s, name, shape, std, s.format_of(part, layer))  # type: ignore[arg-type]

    def norm(name: str, size: int) -> tuple[str, np.ndarray, str]:
        return name, between(s.seed, name, (size,), 0.4, 1.6), "F32"

    yield weight("token_embd.weight", (s.vocab, s.hidden), 0.05)
    yield norm("output_norm.weight", s.hidden)
    yield weight("output.weight", (s.vocab, s.hidden), 2.8 * root)
    for n in range(s.layers):
        b = f"blk.{n}."
        yield norm(b + "attn_norm.weight", s.hidden)
        if s.query_width:
            yield weight(b + "attn_q_a.weight", (s.query_width, s.hidden), 0.1 * root)
            yield norm(b + "attn_q_a_norm.weight", s.query_width)
            yield weight(b + "attn_q_b.weight", (s.heads * key, s.query_width), 1.5 / math.sqrt(s.query_width))
        else:
            yield weight(b + "attn_q.weight", (s.heads * key, s.hidden), 1.5 * root)
        # of vectors so small that the constant inside their norm counts
        yield weight(b + "attn_kv_a_mqa.weight", (s.width + s.rope, s.hidden), 0.1 * root)
        yield norm(b + "attn_kv_a_norm.weight", s.width)
        yield weight(b + "attn_k_b.weight", (s.heads, s.width, s.nope), 1.5 / math.sqrt(s.width))
        yield weight(b + "attn_v_b.weight", (s.heads, s.values, s.width), 1 / math.sqrt(s.width))
        yield weight(b + "attn_output.weight", (s.hidden, s.heads * s.values), 1.5 / math.sqrt(s.heads * s.values))
        yield norm(b + "ffn_norm.weight", s.hidden)
        parts: list[tuple[str, tuple[int, ...], int]] = [("", (), s.ff)]
        if n >= s.dense:
            parts = [("_exps", (s.experts,), s.expert_ff), ("_shexp", (), s.shared * s.expert_ff)]
            yield b + "ffn_gate_inp.weight", bell(s.seed, b + "router", (s.experts, s.hidden)) * np.float32(1.5 * root), "F32"
            if s.normalized:
                yield b + "exp_probs_b.bias", bell(s.seed, b + "bias", (s.experts,)) * np.float32(0.2), "F32"
        for part, lead, ff in parts:
            yield weight(f"{b}ffn_gate{part}.weight", (*lead, ff, s.hidden), 1.3 * root)
            yield weight(f"{b}ffn_up{part}.weight", (*lead, ff, s.hidden), 1.3 * root)
            yield weight(f"{b}ffn_down{part}.weight", (*lead, s.hidden, ff), 1 / math.sqrt(ff))


def numbers(array: np.ndarray, format: str) -> np.ndarray:
    """float32 values that a stored tensor stands for."""
    return array if format == "F32" else gguf.quants.dequantize(array, gguf.GGMLQuantizationType[format])


def write_gguf(s: Spec, path: Path, *, older: bool = False, scoring: bool = True) -> None:
    """Writes the GGUF file. older: with `attn_kv_b`, as converters wrote before the split; scoring: whether the key of the
    router's function is there."""
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_name(s.name)
    w.add_block_count(s.layers)
    w.add_context_length(s.context)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.ff)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.heads if older else 1)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.theta)
    w.add_vocab_size(s.vocab)
    w.add_file_type(0)
    w.add_leading_dense_block_count(s.dense)
    if s.query_width:
        w.add_q_lora_rank(s.query_width)
    w.add_kv_lora_rank(s.width)
    w.add_key_length(s.nope + s.rope if older else s.width + s.rope)
    w.add_value_length(s.values if older else s.width)
    if not older:
        w.add_key_length_mla(s.nope + s.rope)
        w.add_value_length_mla(s.values)
    w.add_rope_dimension_count(s.rope)
    w.add_expert_feed_forward_length(s.expert_ff)
    w.add_expert_count(s.experts)
    w.add_expert_used_count(s.top_k)
    w.add_expert_shared_count(s.shared)
    w.add_expert_weights_scale(s.scale)
    if s.normalized:
        w.add_expert_weights_norm(True)
    if scoring:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if s.normalized else gguf.ExpertGatingFuncType.SOFTMAX)
    if s.groups > 1:
        w.add_expert_group_count(s.groups)
        w.add_expert_group_used_count(s.groups_used)
    if s.yarn:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(s.yarn[0])
        w.add_rope_scaling_orig_ctx_len(s.yarn[1])
        w.add_rope_scaling_yarn_log_mul(0.1 * s.yarn[2])
    add_tokenizer(w, s.vocab)
    found = list(stored(s))
    if older:
        of_directory = dict(tensors(s))
        for n in range(s.layers):
            joined = of_directory[f"model.layers.{n}.self_attn.kv_b_proj.weight"]
            found = [entry for entry in found if entry[0] not in (f"blk.{n}.attn_k_b.weight", f"blk.{n}.attn_v_b.weight")]
            format = s.format_of("attn_v_b", n)
            if format != "F32":
                joined = gguf.quants.quantize(joined, gguf.GGMLQuantizationType[format])
            found.append((f"blk.{n}.attn_kv_b.weight", joined, format))
    for name, array, format in found:
        w.add_tensor(name, array, raw_dtype=None if format == "F32" else gguf.GGMLQuantizationType[format])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- directories

MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def tensors(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the directory: name and float32 values."""
    keys: dict[str, np.ndarray] = {}
    for name, array, format in stored(s):
        values, (stem, _, _) = numbers(array, format), name.rpartition(".")
        if stem in WHOLE:
            yield f"{WHOLE[stem]}.weight", values
            continue
        _, number, part = stem.split(".")
        b = f"model.layers.{number}."
        if part == "attn_k_b":
            keys[number] = values.swapaxes(1, 2)  # [heads, nope, width]
        elif part == "attn_v_b":
            both = np.concatenate([keys[number], values], axis=1)
            yield b + "self_attn.kv_b_proj.weight", np.ascontiguousarray(both.reshape(-1, s.width))
        elif part == "exp_probs_b":
            yield b + "mlp.gate.e_score_correction_bias", values
        elif part.endswith("_exps"):
            for expert, own in enumerate(values):
                yield f"{b}mlp.experts.{expert}.{part.split('_')[1]}_proj.weight", own
        else:
            yield f"{b}{MODULES[part]}.weight", values


def config_json(s: Spec) -> dict[str, Any]:
    """The content of config.json."""
    made: dict[str, Any] = {
        "architectures": [CLASSES[s.kind]],
        "model_type": s.kind,
        "hidden_size": s.hidden,
        "intermediate_size": s.ff,
        "moe_intermediate_size": s.expert_ff,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "q_lora_rank": s.query_width or None,
        "kv_lora_rank": s.width,
        "qk_nope_head_dim": s.nope,
        "qk_rope_head_dim": s.rope,
        "v_head_dim": s.values,
        "n_routed_experts": s.experts,
        "n_shared_experts": s.shared,
        "num_experts_per_tok": s.top_k,
        "n_group": s.groups,
        "topk_group": s.groups_used,
        "norm_topk_prob": s.normalized,
        "routed_scaling_factor": s.scale,
        "vocab_size": s.vocab,
        "max_position_embeddings": s.context,
        "rms_norm_eps": s.eps,
        "rope_theta": s.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": s.vocab - 4,
    }
    if s.kind == "glm4_moe_lite":
        made["mlp_layer_types"] = ["dense" if n < s.dense else "sparse" for n in range(s.layers)]
    else:
        made["first_k_dense_replace"] = s.dense
    if s.kind == "deepseek_v2":
        made["topk_method"] = "group_limited_greedy" if s.groups > 1 else "greedy"
    if s.yarn:
        factor, original, scale = s.yarn
        made["rope_scaling"] = {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": scale,
            "mscale_all_dim": scale,
        }
    return made


def write_directory(s: Spec, path: Path, **changes: Any) -> str:
    """Writes the directory and returns the digest of its tensors. changes: of config.json."""
    path.mkdir(parents=True, exist_ok=True)
    entries, digest = [], hashlib.sha256()
    for name, values in tensors(s):
        digest.update(f"{name} {values.shape}".encode() + values.tobytes())
        entries.append((name, "F32", values.shape, to_bytes(values, "F32")))
    (path / "model.safetensors").write_bytes(safetensors(entries))
    (path / "config.json").write_text(json.dumps(config_json(s) | changes, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab)))
    names = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[3], "bos_token": None}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return digest.hexdigest()
