"""config.json of a checkpoint directory: what the model is, and how its tensors are to be read.

The one idea: a key counts if transformers' class of that model_type has it (config_fields.py); any other changes nothing
there, and nothing here. Of those that count every one is read, or neutral (null, false, 0, empty), or refused by name.
Defaults are those that the format defines for files of before a key existed.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import (
    ATTENTION_FACTOR,
    EPS,
    FACTOR,
    MOST_LAYERS,
    SCALE,
    THETA,
    TURNS,
    Keys,
    ModelConfig,
    RopeScaling,
    is_neutral,
    shown,
    yarn_turns,
)
from ferrum_jax.config_fields import FIELDS, ROPE_FIELDS
from ferrum_jax.encoder_config import MODEL_CLASS, EncoderConfig, encoder_from_json, is_encoder
from ferrum_jax.errors import ModelFileError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model class means. window: the sliding window where the key is absent; windowed: "always" where
    `sliding_window` counts as it stands, "use" where `use_sliding_window` must ask for it; biases: of queries, keys and
    values, whatever the keys say."""

    architecture: str
    model_type: str
    experts: bool = False
    theta: float = 10_000.0
    head_dim: int | None = None
    window: int = 0
    windowed: str = ""
    biases: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama", "llama"),
    "MistralForCausalLM": Family("llama", "mistral", window=4096, windowed="always"),
    "MixtralForCausalLM": Family("llama", "mixtral", experts=True, theta=1e6, windowed="always"),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2", window=4096, windowed="use", biases=True),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3", head_dim=128, window=4096, windowed="use"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", "qwen3_moe", experts=True, window=4096, windowed="use"),
}

_ENCODER_BIASES = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"})


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A config.json, read. tied: the output matrix is the embedding; biases: of which matrices there must be, by the stem
    of the tensor's name; rope_factors: float32 [rope_dim / 2] that divide the rotary frequencies, or None;
    quantization: how matrices are packed, as the file states it, or None."""

    config: ModelConfig | EncoderConfig
    model_class: str
    tied: bool
    biases: frozenset[str]
    rope_factors: np.ndarray | None
    quantization: dict[str, Any] | None


def read_config(content: dict[str, Any], path: Path) -> ConfigFile:
    """What the object in config.json at `path` says. Raises UnsupportedModelError for a model class or feature that is
    not implemented, ModelFileError for a missing or impossible key."""
    if is_encoder(content):
        encoder = encoder_from_json(content, path)
        return ConfigFile(encoder, MODEL_CLASS, True, _ENCODER_BIASES, None, None)
    name, family = _family(content, path)
    keys = Keys({key: value for key, value in content.items() if key in FIELDS[family.model_type]}, "", str(path))
    if keys.has("hidden_act") and (act := keys.get("hidden_act")) != "silu":
        raise keys.unsupported("hidden_act", f"{shown(act)} is not supported; supported: 'silu'")
    if not _flag(keys, "is_causal", True):
        raise keys.unsupported("is_causal", "false is not supported")
    if not is_neutral(packing := content.get("quantization")):  # of MLX, whose packing nothing here reads
        raise keys.unsupported("quantization", f"{shown(packing)} is not supported")
    hidden = keys.integer("hidden_size")
    layers = keys.integer("num_hidden_layers", high=MOST_LAYERS)
    heads = keys.integer("num_attention_heads", high=2**16)
    kv_heads = keys.integer("num_key_value_heads", high=2**16) if keys.has("num_key_value_heads") else heads
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    head_dim = _head_dim(keys, family, hidden, heads)
    context = keys.integer("max_position_embeddings")
    theta, scaling, factors = _rope(keys, family, head_dim, context)
    if scaling is not None and scaling.kind == "yarn":
        context = max(context, int(scaling.factor * scaling.original_context))
        if context >= 2**31:
            text = f"times {scaling.original_context} original positions is a context of {context}; at most {2**31 - 1} is"
            raise keys.fail("rope_scaling", f"factor {scaling.factor} {text}")
    attention_bias = _flag(keys, "attention_bias")
    stems = {"attn_q", "attn_k", "attn_v"} if attention_bias or family.biases else set()
    stems |= {"attn_output"} if attention_bias and not family.biases else set()
    stems |= {"ffn_gate", "ffn_up", "ffn_down"} if _flag(keys, "mlp_bias") else set()
    dense, experts = _experts(keys, family, layers)
    keys.asked.add("intermediate_size")  # of no layer where all are mixtures
    config = ModelConfig(
        architecture=family.architecture,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size") if dense or not experts else 0,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=keys.integer("vocab_size"),
        context_length=context,
        rms_norm_eps=keys.number("rms_norm_eps", EPS),
        rope_theta=theta,
        rope_dim=head_dim,
        rope_scaling=scaling,
        sliding_window=_window(keys, family, layers),
        dense_layers=dense,
        **experts,
    )
    tied = _flag(keys, "tie_word_embeddings")
    keys.refuse_unread("{} is not supported")
    quantization = content.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise keys.fail("quantization_config", "must be an object")
    return ConfigFile(config, name, tied, frozenset(stems), factors, quantization)


def _family(content: dict[str, Any], path: Path) -> tuple[str, Family]:
    names, kind = content.get("architectures"), content.get("model_type")
    if names is None and isinstance(kind, str):
        names = [name for name, family in FAMILIES.items() if family.model_type == kind] or [kind]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelFileError(f"{path}: key architectures: must name one model class, not {names!r}")
    family = FAMILIES.get(names[0])
    if family is None:
        known = ", ".join((*FAMILIES, MODEL_CLASS))
        raise UnsupportedModelError(f"{path}: key architectures: {names[0]} is not supported; supported: {known}")
    if kind is not None and kind != family.model_type:
        raise ModelFileError(f"{path}: key model_type: {kind!r} is not that of {names[0]}, {family.model_type!r}")
    return names[0], family


def _flag(keys: Keys, key: str, default: bool = False) -> bool:
    return keys.boolean(key) if keys.has(key) else default


def _head_dim(keys: Keys, family: Family, hidden: int, heads: int) -> int:
    if keys.has("head_dim"):
        head_dim = keys.integer("head_dim", high=2**14)
    elif family.head_dim is not None:
        head_dim = family.head_dim
    elif hidden % heads:
        raise keys.fail("head_dim", f"is missing and {hidden} is no multiple of {heads} heads")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise keys.fail("head_dim", f"is {head_dim}; it must be even")
    return head_dim


def _experts(keys: Keys, family: Family, layers: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers without experts, and the fields of `ModelConfig` about experts (none where no layer has them)."""
    if not family.experts:
        return (), {}
    qwen = family.architecture == "qwen3moe"
    named = [key for key in ("num_experts", "num_local_experts") if keys.has(key)]  # two names of one thing
    counts = [keys.integer(key, low=0 if qwen else 1, high=2**16) for key in named or ["num_local_experts"]]
    count = counts[0]
    if count != counts[-1]:
        raise keys.fail("num_experts", f"is {count}, but num_local_experts is {counts[-1]}")
    dense: tuple[int, ...] = ()
    if qwen:
        step = keys.integer("decoder_sparse_step") if keys.has("decoder_sparse_step") else 1
        only = keys.get("mlp_only_layers") or []
        if not isinstance(only, list) or not all(type(n) is int and 0 <= n < layers for n in only):
            raise keys.fail("mlp_only_layers", f"must be a list of layers from 0 to {layers - 1}, not {only!r:.100}")
        dense = tuple(n for n in range(layers) if n in only or not count or (n + 1) % step)
    if len(dense) == layers:
        keys.asked.update(("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"))
        return (), {}
    return dense, {
        "num_experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", high=count),
        "expert_intermediate_size": keys.integer("moe_intermediate_size" if qwen else "intermediate_size"),
        "norm_topk_prob": _flag(keys, "norm_topk_prob") if qwen else True,
    }


def _window(keys: Keys, family: Family, layers: int) -> int:
    """The sliding window of every layer, 0 for none; windows of some layers only are refused."""
    kinds = keys.get("layer_types")
    keys.asked.update(("use_sliding_window", "max_window_layers"))
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise keys.fail("layer_types", f"must be a list of {layers} kinds")
    if not family.windowed or (family.windowed == "use" and not _flag(keys, "use_sliding_window")):
        window = 0
        if not is_neutral(keys.get("sliding_window")) and not family.windowed:
            raise keys.unsupported("sliding_window", "is not supported in this model class")
    elif "sliding_window" in keys.metadata:
        window = keys.integer("sliding_window", low=0) if keys.has("sliding_window") else 0
    else:
        window = family.window
    if kinds is None and family.windowed == "use" and family.architecture != "qwen3moe":
        full = min(keys.integer("max_window_layers", low=0) if keys.has("max_window_layers") else 28, layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if window and 0 < full < layers:
            raise keys.unsupported("max_window_layers", f"a window in the layers from {full} on only is not supported")
    found = set(map(str, kinds or ()))
    if not found <= {"full_attention", "sliding_attention"} or (window and len(found) > 1):
        raise keys.unsupported("layer_types", f"{sorted(found)} in one model is not supported")
    if found == {"sliding_attention"} and not window:
        raise keys.fail("layer_types", "names sliding_attention, but there is no sliding_window")
    return 0 if found == {"full_attention"} else window


_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def _rope(keys: Keys, family: Family, head_dim: int, context: int) -> tuple[float, RopeScaling | None, np.ndarray | None]:
    """theta, the scaling, and the factors of LLaMA-3.1's. Where both objects are there, rope_scaling counts."""
    parameters = keys.get("rope_parameters")
    name, stated = ("rope_scaling", keys.get("rope_scaling")) if keys.get("rope_scaling") else ("rope_parameters", parameters)
    if stated is not None and not isinstance(stated, dict):
        raise keys.fail(name, "must be an object")
    given = {key: value for key, value in (stated or {}).items() if value is not None}
    if nested := next((key for key, value in given.items() if isinstance(value, dict)), None):
        raise keys.unsupported(name, f"{nested}: parameters by kind of layer are not supported")
    rope = Keys(
        {key: value for key, value in given.items() if key in ROPE_FIELDS or key == "type"}, "", f"{keys.source}: key {name}"
    )
    theta = keys.number("rope_theta", THETA) if keys.has("rope_theta") else family.theta
    theta = rope.number("rope_theta", THETA) if rope.has("rope_theta") else theta
    for place in (keys, rope):
        if place.has("partial_rotary_factor") and place.number("partial_rotary_factor") != 1.0:
            raise place.unsupported("partial_rotary_factor", "only 1 is supported")
    kind, legacy = rope.get("rope_type"), rope.get("type")
    kind = kind or legacy or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise UnsupportedModelError(f"{rope.source}: rope_type {shown(kind)} is not supported; supported: {known}")
    original = context
    for place in (rope, keys):  # the latter counts where both have it
        if place.has("original_max_position_embeddings") and kind not in ("default", "linear"):
            original = place.integer("original_max_position_embeddings")
    if kind == "default":
        return theta, None, None
    factor = rope.number("factor", FACTOR)
    scaling, factors = None, None
    if kind == "linear":
        scaling = RopeScaling("linear", factor)
    elif kind == "yarn":
        scaling = _yarn(rope, factor, original)
    else:
        factors = _llama3_factors(rope, theta, head_dim, factor, original)
    for key, value in rope.metadata.items():
        if key not in rope.asked and not is_neutral(value):
            raise UnsupportedModelError(f"{rope.source}: {key} is not supported with rope_type {kind!r}")
    return theta, scaling, factors


def _yarn(rope: Keys, factor: float, original: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071) with the constants of its section 3.2 where there are none."""
    if not _flag(rope, "truncate", True):
        raise UnsupportedModelError(f"{rope.source}: truncate: false is not supported")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = magnitude(1.0)
    each = [rope.number(key, SCALE) if rope.has(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    if rope.has("attention_factor"):
        attention = rope.number("attention_factor", ATTENTION_FACTOR)
    elif all(each):
        attention = magnitude(each[0]) / magnitude(each[1])
    fast, slow = yarn_turns(rope, "beta_fast", "beta_slow")
    return RopeScaling("yarn", factor, original, attention, fast, slow)


def _llama3_factors(rope: Keys, theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """LLaMA-3.1's divisors of the rotary frequencies: `factor` for wavelengths that the original context does not hold
    `low_freq_factor` times, 1 for those that it holds `high_freq_factor` times, between them a blend of frequencies."""
    low, high = rope.number("low_freq_factor", TURNS), rope.number("high_freq_factor", TURNS)
    if high <= low:
        raise rope.fail("high_freq_factor", f"is {high}; it must be above low_freq_factor {low}")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / factor + blend)).astype(np.float32)
