"""Tiny random models whose routers have sigmoids and a bias of the choice (GLM-4.5, LFM2), as directories and as GGUF files.

Both have the same numbers: the directory has in float32 what the blocks of the GGUF file stand for, so transformers' logits of
the directory are right for both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from support import GOLDENS
from support.goldens.tiny_directories import TEMPLATE, safetensors, to_bytes, tokenizer_json
from support.goldens.tiny_models import SPECIALS, add_tokenizer, between, matrix

HERE = GOLDENS / "mixtures"
LENGTHS = (1, 17, 130, 1000)
CLASSES = {
    "glm4moe": ("Glm4MoeForCausalLM", "glm4_moe"),
    "lfm2": ("Lfm2ForCausalLM", "lfm2"),
    "lfm2moe": ("Lfm2MoeForCausalLM", "lfm2_moe"),
}
RENAMED = {  # what LFM2 calls otherwise than GLM: in directories, and the norms in GGUF files
    "model.norm": "model.embedding_norm", "input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm",
    "o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2", "mlp.gate.e_score_correction_bias": "feed_forward.expert_bias", "mlp": "feed_forward",
}  # fmt: skip
RENAMED_GGUF = {"output_norm": "token_embd_norm", "post_attention_norm": "ffn_norm"}
# Kinds of matrices by ggml type names, taken in turn by layer; "*" for the rest. Rows of 128 have no K-quants.
MIX = {
    "*": ("Q4_K",), "v": ("Q6_K", "Q4_K"), "down": ("Q6_K",), "output": ("Q6_K",),
    "down_exps": ("Q5_0", "Q8_0"), "down_shexp": ("Q5_0",),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a tiny model is. attends: the layers with attention (None: all); the others have a convolution of `taps`. formats:
    as in `tiny_models.Spec`."""

    name: str
    arch: str = "glm4moe"
    layers: int = 4
    attends: tuple[int, ...] | None = None
    taps: int = 3
    dense: int = 1
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ff: int = 192
    experts: int = 8
    top_k: int = 3
    expert_ff: int = 64
    shared: int = 1
    groups: int = 1
    groups_used: int = 1
    normalize: bool = True
    scale: float = 2.5
    biased: bool = True
    normed: bool = True
    vocab: int = 320
    tied: bool = False
    eps: float = 1e-5
    theta: float = 1e4
    formats: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 1


LFM2: dict[str, Any] = {"head_dim": 32, "dense": 1, "shared": 0, "scale": 1.0, "biased": False, "tied": True}
CASES = [
    Spec("glm4moe", seed=81),
    Spec("glm4moe-q8_0", layers=3, dense=2, shared=2, groups=4, groups_used=2, normalize=False, scale=1.0, biased=False,
         normed=False, formats={"*": ("Q8_0",)}, seed=82),
    Spec("glm4moe-q4_k_m", layers=3, hidden=256, ff=256, expert_ff=128, experts=16, formats=MIX, seed=83),
    Spec("lfm2moe", "lfm2moe", attends=(1,), **LFM2, seed=84),
    Spec("lfm2moe-q8_0", "lfm2moe", layers=3, attends=(2,), taps=4, formats={"*": ("Q8_0",)}, **LFM2, seed=85),
    Spec("lfm2", "lfm2", layers=3, attends=(0,), experts=0, **LFM2 | {"dense": 3}, seed=86),
]  # fmt: skip


def config_json(s: Spec) -> dict[str, Any]:
    """The content of config.json."""
    model_class, model_type = CLASSES[s.arch]
    common = {
        "architectures": [model_class],
        "model_type": model_type,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "vocab_size": s.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": s.tied,
        "dtype": "float32",
        "eos_token_id": s.vocab - 4,
        "rope_theta": s.theta,
        "intermediate_size": s.ff,
    }
    experts = {
        "moe_intermediate_size": s.expert_ff,
        "num_experts_per_tok": s.top_k,
        "norm_topk_prob": s.normalize,
        "routed_scaling_factor": s.scale,
    }
    if s.arch == "glm4moe":
        return common | experts | {
            "head_dim": s.head_dim,
            "rms_norm_eps": s.eps,
            "hidden_act": "silu",
            "rope_scaling": None,
            "partial_rotary_factor": 0.5,
            "attention_bias": s.biased,
            "use_qk_norm": s.normed,
            "n_routed_experts": s.experts,
            "n_shared_experts": s.shared,
            "n_group": s.groups,
            "topk_group": s.groups_used,
            "first_k_dense_replace": s.dense,
            "num_nextn_predict_layers": 0,
        }  # fmt: skip
    kinds = ["full_attention" if number in (s.attends or ()) else "conv" for number in range(s.layers)]
    own = {"norm_eps": s.eps, "conv_L_cache": s.taps, "conv_bias": False, "layer_types": kinds}
    if s.arch == "lfm2":
        return common | own | {"block_auto_adjust_ff_dim": False, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
    return common | own | experts | {"num_experts": s.experts, "num_dense_layers": s.dense, "use_expert_bias": True}


class Made(NamedTuple):
    """A tensor: its names in the directory and in the GGUF file (of an expert: that of all of the layer), the data of the GGUF
    file and its type, and what they stand for, float32."""

    module: str
    name: str
    data: np.ndarray
    format: str
    values: np.ndarray


def tensors(s: Spec) -> Iterator[Made]:
    """The tensors of the model."""
    for made in _tensors(s):
        module, name = made.module, made.name
        if s.arch != "glm4moe":
            for old, new in RENAMED.items():
                module = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, module)
            for old, new in RENAMED_GGUF.items():
                name = name.replace(old, new)
        yield made._replace(module=module, name=name)


def _tensors(s: Spec) -> Iterator[Made]:
    """With the names of GLM."""
    root = 1 / math.sqrt(s.hidden)

    def weight(module: str, name: str, kind: str, layer: int, shape: tuple[int, int], std: float) -> Made:
        names = s.formats.get(kind, s.formats.get("*", ("F32",)))
        known = name if name in ("token_embd.weight", "output.weight") else module
        data, format = matrix(s, known, shape, std, names[layer % len(names)])
        values = data if format == "F32" else gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format])
        return Made(f"{module}.weight", name, data, format, values)

    def plain(module: str, name: str, shape: tuple[int, ...], low: float, high: float) -> Made:
        values = between(s.seed, module, shape, low, high)
        return Made(module, name, values, "F32", values)

    yield weight("model.embed_tokens", "token_embd.weight", "embd", 0, (s.vocab, s.hidden), 2.8 * root if s.tied else 0.05)
    yield plain("model.norm.weight", "output_norm.weight", (s.hidden,), 0.4, 1.6)
    if not s.tied:
        yield weight("lm_head", "output.weight", "output", 0, (s.vocab, s.hidden), 2.8 * root)
    for n in range(s.layers):
        own, b = f"model.layers.{n}.", f"blk.{n}."
        yield plain(own + "input_layernorm.weight", b + "attn_norm.weight", (s.hidden,), 0.4, 1.6)
        yield plain(own + "post_attention_layernorm.weight", b + "post_attention_norm.weight", (s.hidden,), 0.4, 1.6)
        if s.attends is None or n in s.attends:
            for x, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
                rows, module = heads * s.head_dim, f"{own}self_attn.{x}_proj"
                yield weight(module, f"{b}attn_{x}.weight", x, n, (rows, s.hidden), (1.0 if x == "v" else 1.3) * root)
                if s.biased:
                    yield plain(f"{module}.bias", f"{b}attn_{x}.bias", (rows,), -0.8, 0.8)
                if s.normed and x != "v":
                    yield plain(f"{own}self_attn.{x}_norm.weight", f"{b}attn_{x}_norm.weight", (s.head_dim,), 0.5, 2.0)
            columns = s.heads * s.head_dim
            yield weight(
                own + "self_attn.o_proj", b + "attn_output.weight", "o", n, (s.hidden, columns), 2 / math.sqrt(columns)
            )
        else:
            conv, g = own + "conv.", b + "shortconv."
            yield weight(conv + "in_proj", g + "in_proj.weight", "in", n, (3 * s.hidden, s.hidden), 1.6 * root)
            taps = plain(conv + "conv.weight", g + "conv.weight", (s.hidden, s.taps), -1.0, 1.0)
            yield taps._replace(values=taps.values[:, None])
            yield weight(conv + "out_proj", g + "out_proj.weight", "out", n, (s.hidden, s.hidden), 2 * root)
        parts = [("mlp.", "", s.ff)]
        if n >= s.dense:
            yield plain(own + "mlp.gate.weight", b + "ffn_gate_inp.weight", (s.experts, s.hidden), -2.5 * root, 2.5 * root)
            yield plain(own + "mlp.gate.e_score_correction_bias", b + "exp_probs_b.bias", (s.experts,), -0.4, 0.4)
            parts = [(f"mlp.experts.{e}.", "_exps", s.expert_ff) for e in range(s.experts)]
            parts += [("mlp.shared_experts.", "_shexp", s.shared * s.expert_ff)] if s.shared else []
        for module, suffix, ff in parts:
            for x in ("gate", "up", "down"):
                shape, std = ((s.hidden, ff), 1.5 / math.sqrt(ff)) if x == "down" else ((ff, s.hidden), 1.3 * root)
                yield weight(f"{own}{module}{x}_proj", f"{b}ffn_{x}{suffix}.weight", x + suffix, n, shape, std)


def write_directory(s: Spec, path: Path, *, nextn: bool = False) -> str:
    """Writes the directory and returns the digest of its tensors. nextn: with a block after the layers that predicts further
    tokens."""
    path.mkdir(parents=True, exist_ok=True)
    digest, config, entries = hashlib.sha256(), config_json(s), []
    for made in tensors(s):
        digest.update(f"{made.module} {made.values.shape}".encode() + made.values.tobytes())
        entries.append((made.module, made.values))
    if nextn:
        config["num_nextn_predict_layers"], last = 1, f"model.layers.{s.layers - 1}."
        extra = f"model.layers.{s.layers}."
        entries += [(name.replace(last, extra), values) for name, values in entries if name.startswith(last)]
        entries += [(f"{extra}eh_proj.weight", np.ones((s.hidden, 2 * s.hidden), np.float32))]
    stored = [(name, "F32", values.shape, to_bytes(values, "F32")) for name, values in entries]
    (path / "model.safetensors").write_bytes(safetensors(stored))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab)))
    names = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[3], "bos_token": None}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return digest.hexdigest()


def write_gguf(s: Spec, path: Path, *, nextn: bool = False) -> None:
    """Writes the GGUF file, with the keys that llama.cpp's converter writes."""
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(s.name)
    w.add_block_count(s.layers + nextn)
    w.add_context_length(2048)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.ff)
    w.add_head_count(s.heads)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.theta)
    w.add_vocab_size(s.vocab)
    w.add_file_type(0)
    if s.arch == "glm4moe":
        w.add_head_count_kv(s.kv_heads)
        w.add_key_length(s.head_dim)
        w.add_value_length(s.head_dim)
        w.add_rope_dimension_count(s.head_dim // 2)
        w.add_expert_shared_count(s.shared)
        w.add_expert_weights_scale(s.scale)
        w.add_expert_weights_norm(s.normalize)
        w.add_expert_group_count(s.groups)
        w.add_expert_group_used_count(s.groups_used)
    else:
        w.add_head_count_kv([s.kv_heads if number in (s.attends or ()) else 0 for number in range(s.layers)])
        w.add_shortconv_l_cache(s.taps)
    if s.experts:
        w.add_expert_count(s.experts)
        w.add_expert_used_count(s.top_k)
        w.add_expert_feed_forward_length(s.expert_ff)
        w.add_leading_dense_block_count(s.dense)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    add_tokenizer(w, s.vocab)
    found: list[tuple[str, np.ndarray, str]] = []
    for name, parts in itertools.groupby(sorted(tensors(s), key=lambda made: made.name), lambda made: made.name):
        data, formats = zip(*((made.data, made.format) for made in parts), strict=True)
        found.append((name, np.stack(data) if "_exps" in name else data[0], formats[0]))
    if nextn:
        w.add_nextn_predict_layers(1)
        last, extra = f"blk.{s.layers - 1}.", f"blk.{s.layers}."
        found += [(name.replace(last, extra), *more) for name, *more in found if name.startswith(last)]
        found += [(f"{extra}nextn.eh_proj.weight", np.ones((s.hidden, 2 * s.hidden), np.float32), "F32")]
    for name, data, format in found:
        w.add_tensor(name, data, raw_dtype=None if format == "F32" else gguf.GGMLQuantizationType[format])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
