"""Tiny random models of Gemma, as directories and as GGUF files.

The directory of a `Spec` is what transformers reads. The GGUF file holds the same numbers under llama.cpp's names; norms of
Gemma 3 have 1 added there, as its converter does. The numbers of a matrix are those that its format has.
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
from support.goldens import tiny_models
from support.goldens.golden_cases import MIX
from support.goldens.tiny_directories import TEMPLATE, from_bytes, safetensors, to_bytes, tokenizer_json
from support.goldens.tiny_models import SPECIALS, add_tokenizer, between

HERE = GOLDENS / "gemma"
LENGTHS = (1, 17, 130, 1000)
CLASSES = {"gemma3": ("Gemma3ForCausalLM", "gemma3_text"), "gemma4": ("Gemma4ForCausalLM", "gemma4_text")}
_UNUSED = 1e30  # divides the frequency of a pair that does not turn


@dataclass(frozen=True)
class Spec:
    """What a tiny model is. slides: of each layer, whether it has the window. formats: as of tiny_models.Spec, which has the
    same names for what `tiny_models.matrix` needs; dtype: of the directory. scalar: `query_pre_attn_scalar`, 0: head_dim.
    rope_factor: of layers without a window, 0: none. Of Gemma 4: full_dim, full_kv_heads: of layers without a window; shared:
    the number of layers that read others' keys and values; inputs: the width of what a layer alone gets; k_is_v: values of
    layers without a window are their keys; experts, top_k, expert_ff: of the mixture next to the feed-forward."""

    name: str
    arch: str
    slides: tuple[bool, ...] = (True, True, True, True, True, False, True)
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ff: int = 192
    window: int = 24
    scalar: int = 0
    rope_factor: float = 0.0
    softcap: float = 0.0
    full_dim: int = 64
    full_kv_heads: int = 0
    shared: int = 0
    double: bool = False
    inputs: int = 0
    k_is_v: bool = False
    experts: int = 0
    top_k: int = 3
    expert_ff: int = 64
    vocab: int = 320
    eps: float = 2.0**-17  # which float32 has exactly
    theta: float = 1e5
    local_theta: float = 1e3
    dtype: str = "F32"
    formats: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tied: bool = True
    seed: int = 1

    @property
    def layers(self) -> int:
        return len(self.slides)

    @property
    def own(self) -> int:
        """The number of layers that have keys and values."""
        return self.layers - self.shared

    def format_of(self, kind: str, layer: int) -> str:
        """As of tiny_models.Spec."""
        names = self.formats.get(kind, self.formats.get("*", ("F32",)))
        return names[layer % len(names)]

    def width_of(self, layer: int) -> int:
        """Of a head in this layer."""
        return self.full_dim if self.arch == "gemma4" and not self.slides[layer] else self.head_dim

    def kv_heads_of(self, layer: int) -> int:
        """The number of heads of keys in this layer."""
        return self.full_kv_heads if self.full_kv_heads and not self.slides[layer] else self.kv_heads

    def ff_of(self, layer: int) -> int:
        """The width of the feed-forward of this layer."""
        return self.ff * 2 if self.double and layer >= self.own else self.ff


Q8_0 = {"*": ("Q8_0",)}
WIDE = {"hidden": 256, "head_dim": 64, "ff": 256}
SHARING = {
    "slides": (True, False, True, True, False, True, True, False),
    "shared": 3,
    "double": True,
    "inputs": 32,
    "softcap": 3.0,
}
MIXED = {"slides": (True, False, True, False), "full_kv_heads": 1, "k_is_v": True, "experts": 8}
CASES = [
    Spec("gemma3", "gemma3", rope_factor=8.0, seed=81),
    Spec("gemma3-q8_0", "gemma3", kv_heads=1, softcap=10.0, tied=False, formats=Q8_0, seed=82),
    Spec("gemma3-q4_k_m", "gemma3", **WIDE, formats=MIX, seed=83),
    Spec("gemma3-bf16", "gemma3", slides=(True, False, True), scalar=80, dtype="BF16", seed=84),
    Spec("gemma4", "gemma4", **SHARING, seed=85),
    Spec("gemma4-q8_0", "gemma4", slides=(True, False, True, False), full_kv_heads=1, k_is_v=True, formats=Q8_0, seed=86),
    Spec("gemma4-q4_k_m", "gemma4", **SHARING | WIDE, full_dim=128, formats=MIX | {"narrow": ("Q5_0",)}, seed=87),
    Spec("gemma4-moe", "gemma4", **MIXED, softcap=3.0, seed=88),
    Spec("gemma4-moe-q8_0", "gemma4", **MIXED | {"experts": 5, "top_k": 2}, formats=Q8_0, seed=89),
]


def config_json(s: Spec) -> dict[str, Any]:
    """The content of config.json."""
    model_class, model_type = CLASSES[s.arch]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": s.theta}
    if s.rope_factor:
        full |= {"rope_type": "linear", "factor": s.rope_factor}
    if s.arch == "gemma4":
        full |= {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    made: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": model_type,
        "hidden_size": s.hidden,
        "intermediate_size": s.ff,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": s.eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": s.tied,
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[s.dtype],
        "bos_token_id": None,
        "eos_token_id": s.vocab - 4,
        "pad_token_id": s.vocab - 1,
        "sliding_window": s.window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in s.slides],
        "final_logit_softcapping": s.softcap or None,
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": s.local_theta}},
    }
    if s.arch == "gemma3":
        own = {"query_pre_attn_scalar": s.scalar or s.head_dim, "attn_logit_softcapping": None}
        return made | own | {"use_bidirectional_attention": False}
    return made | {
        "attention_k_eq_v": s.k_is_v,
        "enable_moe_block": bool(s.experts),
        "global_head_dim": s.full_dim,
        "hidden_size_per_layer_input": s.inputs,
        "moe_intermediate_size": s.expert_ff if s.experts else None,
        "num_experts": s.experts or None,
        "top_k_experts": s.top_k if s.experts else None,
        "num_global_key_value_heads": s.full_kv_heads or None,
        "num_kv_shared_layers": s.shared,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": s.double,
        "vocab_size_per_layer_input": s.vocab,
    }


def parts(s: Spec) -> Iterator[tuple[str, str, np.ndarray, str]]:
    """Names in the directory and in the GGUF file, the array of the latter as gguf's writer takes it, and its format."""
    h, root = s.hidden, 1 / math.sqrt(s.hidden)
    low, high = (0.4, 1.6) if s.arch == "gemma4" else (-0.6, 0.6)
    head = (0.2, 0.8) if s.arch == "gemma4" else (-0.5, 1.0)  # scores of Gemma 4 are not scaled

    def norm(name: str, known: str, size: int, low: float = low, high: float = high) -> tuple[str, str, np.ndarray, str]:
        return f"{name}.weight", f"{known}.weight", between(s.seed, name, (size,), low, high), "F32"

    def matrix(
        name: str, known: str, kind: str, layer: int, shape: tuple[int, ...], std: float, suffix: str = ".weight"
    ) -> tuple[str, str, np.ndarray, str]:
        made = tiny_models.matrix(s, f"{known}.weight", shape, std, s.format_of(kind, layer))  # type: ignore[arg-type]
        return name + suffix, f"{known}.weight", *made

    yield matrix("model.embed_tokens", "token_embd", "embd", 0, (s.vocab, h), 2.8 * root if s.tied else 0.3)
    if not s.tied:
        yield matrix("lm_head", "output", "output", 0, (s.vocab, h), 2.8 * root)
    yield norm("model.norm", "output_norm", h)
    if s.inputs:
        rows, known, name = s.layers * s.inputs, "per_layer_token_embd", "model.embed_tokens_per_layer"
        yield matrix(name, known, "embd", 0, (s.vocab, rows), 1 / math.sqrt(s.inputs))
        yield matrix("model.per_layer_model_projection", "per_layer_model_proj", "input", 0, (rows, h), 1.0)
        yield norm("model.per_layer_projection_norm", "per_layer_proj_norm", s.inputs)
    for n in range(s.layers):
        b, g, width = f"model.layers.{n}.", f"blk.{n}.", s.width_of(n)
        queries, keys, ff = s.heads * width, s.kv_heads_of(n) * width, s.ff_of(n)
        yield norm(b + "input_layernorm", g + "attn_norm", h)
        yield norm(b + "post_attention_layernorm", g + "post_attention_norm", h)
        yield norm(b + "pre_feedforward_layernorm", g + "ffn_norm", h)
        yield norm(b + "post_feedforward_layernorm", g + "post_ffw_norm", h)
        yield matrix(b + "self_attn.q_proj", g + "attn_q", "q", n, (queries, h), 1.3 * root)
        yield matrix(b + "self_attn.o_proj", g + "attn_output", "o", n, (h, queries), 1.2 / math.sqrt(queries))
        yield norm(b + "self_attn.q_norm", g + "attn_q_norm", width, *head)
        if n < s.own:
            yield norm(b + "self_attn.k_norm", g + "attn_k_norm", width, *head)
            yield matrix(b + "self_attn.k_proj", g + "attn_k", "k", n, (keys, h), 1.3 * root)
            if s.slides[n] or not s.k_is_v:
                yield matrix(b + "self_attn.v_proj", g + "attn_v", "v", n, (keys, h), root)
        if s.arch == "gemma4":
            scalar = between(s.seed, b + "layer_scalar", (1,), 0.6, 1.2)
            yield b + "layer_scalar", g + "layer_output_scale.weight", scalar, "F32"
        if s.inputs:
            yield norm(b + "post_per_layer_input_norm", g + "post_norm", h)
            yield matrix(b + "per_layer_input_gate", g + "inp_gate", "input", n, (s.inputs, h), 1.3 * root)
            yield matrix(b + "per_layer_projection", g + "proj", "narrow", n, (h, s.inputs), 1 / math.sqrt(s.inputs))
        yield matrix(b + "mlp.gate_proj", g + "ffn_gate", "gate", n, (ff, h), 1.3 * root)
        yield matrix(b + "mlp.up_proj", g + "ffn_up", "up", n, (ff, h), 1.3 * root)
        yield matrix(b + "mlp.down_proj", g + "ffn_down", "down", n, (h, ff), 1.5 / math.sqrt(ff))
        if s.experts:
            wide, narrow = (s.experts, 2 * s.expert_ff, h), (s.experts, h, s.expert_ff)
            yield norm(b + "post_feedforward_layernorm_1", g + "post_ffw_norm_1", h)
            yield norm(b + "pre_feedforward_layernorm_2", g + "pre_ffw_norm_2", h)
            yield norm(b + "post_feedforward_layernorm_2", g + "post_ffw_norm_2", h)
            router = between(s.seed, b + "router", (s.experts, h), -3.0, 3.0)
            yield b + "router.proj.weight", g + "ffn_gate_inp.weight", router, "F32"
            for name, known, size in (("scale", "ffn_gate_inp", h), ("per_expert_scale", "ffn_down_exps", s.experts)):
                yield b + f"router.{name}", g + f"{known}.scale", between(s.seed, b + name, (size,), 0.4, 1.6), "F32"
            yield matrix(b + "experts.gate_up_proj", g + "ffn_gate_up_exps", "gate", n, wide, 1.3 * root, "")
            yield matrix(b + "experts.down_proj", g + "ffn_down_exps", "down", n, narrow, 1.5 / math.sqrt(s.expert_ff), "")


def tensors(s: Spec) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the directory: name and float32 values."""
    for name, _, array, format in parts(s):
        values = array
        if array.dtype == np.uint8:
            values = gguf.quants.dequantize(array, gguf.GGMLQuantizationType[format]).reshape(*array.shape[:-1], -1)
        values = from_bytes(to_bytes(values, s.dtype), s.dtype).reshape(values.shape)
        yield name, values


def write_directory(s: Spec, path: Path, *, pictures: bool = False) -> str:
    """Writes the directory and returns the digest of its tensors. pictures: as the model of texts and pictures is published,
    with tensors of vision."""
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
            "vision_config": {"model_type": "siglip_vision_model"},
            "image_token_index": 5,
            "tie_word_embeddings": s.tied,
        }
        root = "language_model." if s.arch == "gemma3" else ""
        inner = "" if s.arch == "gemma3" else "language_model."
        found = [(f"{root}{name.replace('model.', f'model.{inner}', 1)}", values) for name, values in found]
        vision = "" if s.arch == "gemma3" else "model."
        found += [(f"{vision}vision_tower.embeddings.patch_embedding.bias", np.ones(3, np.float32))]
        projector = "multi_modal_projector.mm_soft_emb_norm" if s.arch == "gemma3" else "model.embed_vision.projection"
        found += [(f"{projector}.weight", np.ones((3, 2), np.float32))]
    entries = [(name, s.dtype, values.shape, to_bytes(values, s.dtype)) for name, values in found]
    (path / "model.safetensors").write_bytes(safetensors(entries))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab)))
    names = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[3], "bos_token": None}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return digest.hexdigest()


def of_gguf(s: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of the GGUF file, as llama.cpp's converter makes them: name, array as gguf's writer takes it, format."""
    if s.arch == "gemma4":
        pairs = s.full_dim // 2
        yield "rope_freqs.weight", np.where(np.arange(pairs) < pairs // 4, 1, _UNUSED).astype(np.float32), "F32"
    for _, name, array, format in parts(s):
        yield name, array + np.float32(1) if s.arch == "gemma3" and name.endswith("norm.weight") else array, format


def write_gguf(s: Spec, path: Path) -> None:
    """Writes the GGUF file."""
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(s.name)
    w.add_block_count(s.layers)
    w.add_context_length(2048)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length([s.ff_of(n) for n in range(s.layers)] if s.double else s.ff)
    w.add_head_count(s.heads)
    w.add_head_count_kv([s.kv_heads_of(n) for n in range(s.layers)] if s.full_kv_heads else s.kv_heads)
    w.add_key_length(s.full_dim if s.arch == "gemma4" else s.head_dim)
    w.add_value_length(s.full_dim if s.arch == "gemma4" else s.head_dim)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.theta)
    w.add_float32(f"{s.arch}.rope.freq_base_swa", s.local_theta)
    w.add_sliding_window(s.window)
    w.add_file_type(0)
    if s.rope_factor:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(s.rope_factor)
    if s.arch == "gemma4":
        integers = {"rope.dimension_count": s.full_dim, "rope.dimension_count_swa": s.head_dim}
        integers |= {"attention.key_length_swa": s.head_dim, "attention.value_length_swa": s.head_dim}
        integers |= {"attention.shared_kv_layers": s.shared, "embedding_length_per_layer_input": s.inputs}
        for key, value in integers.items():
            w.add_uint32(f"{s.arch}.{key}", value)
        w.add_array(f"{s.arch}.attention.sliding_window_pattern", list(s.slides))
    if s.experts:
        w.add_expert_count(s.experts)
        w.add_expert_used_count(s.top_k)
        w.add_expert_feed_forward_length(s.expert_ff)
    if s.softcap:
        w.add_final_logit_softcapping(s.softcap)
    add_tokenizer(w, s.vocab)
    for name, array, format in of_gguf(s):
        w.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[format] if array.dtype == np.uint8 else None)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
