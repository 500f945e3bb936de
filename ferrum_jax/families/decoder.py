"""How the keys of decoders become a `ModelConfig`, and how that becomes GGUF keys; a family passes what is special to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_jax.config import MOST_LAYERS, ModelConfig
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families import rope
from ferrum_jax.families.family import ConfigFile, Family, embedding_rows
from ferrum_jax.families.fields import FIELDS
from ferrum_jax.families.keys import EPS, SCALE, THETA, Keys, is_neutral, shown
from ferrum_jax.families.table import Table
from ferrum_jax.files.metadata import Typed

if TYPE_CHECKING:
    from ferrum_jax.files.tensor_info import TensorInfo

Fields = dict[str, Any]  # keywords of ModelConfig


def from_gguf(
    family: Family,
    keys: Keys,
    tensors: Mapping[str, TensorInfo],
    *,
    theta: float | None = None,
    feed_forward: Callable[[Keys, int], Fields] | None = None,
) -> ModelConfig:
    """Implements `Family.from_gguf`. theta: for files without `rope.freq_base` (None: the key is required). feed_forward: reads
    the keywords of `ModelConfig` about the feed-forward, given the number of layers (None: it is dense); tuples have a value
    for each layer."""
    vocab_size = embedding_rows(keys, tensors)
    hidden = keys.integer("embedding_length")
    if keys.has("vocab_size"):
        keys.integer("vocab_size")
    shape = tensors["token_embd.weight"].shape
    if len(shape) != 2 or shape[1] != hidden:
        raise ModelFileError(
            f"{keys.source}: tensor token_embd.weight: shape {list(shape)} does not end in "
            f"{family.architecture}.embedding_length = {hidden}"
        )
    layers = keys.integer("block_count", high=MOST_LAYERS)
    heads = kv_heads = keys.integers("attention.head_count", layers, high=2**16)
    if keys.has("attention.head_count_kv"):
        kv_heads = keys.integers("attention.head_count_kv", layers, high=2**16)
    for layer, (count, kv_count) in enumerate(zip(heads, kv_heads, strict=True)):
        if count % kv_count:
            text = f"{kv_count} of layer {layer} does not divide attention.head_count {count}"
            raise keys.fail("attention.head_count_kv", text)
    head_dim = _head_dim_of_gguf(keys, hidden, heads)
    rope_dim = keys.integer("rope.dimension_count", high=head_dim) if keys.has("rope.dimension_count") else head_dim
    if rope_dim % 2:
        raise keys.fail("rope.dimension_count", f"is {rope_dim}; it must be even")
    of_feed_forward = (feed_forward or dense_from_gguf)(keys, layers)
    if keys.has("attention.causal") and not keys.boolean("attention.causal"):
        raise keys.unsupported("attention.causal", "this feature is not supported")
    for key in ("residual_scale", "embedding_scale", "logit_scale"):
        if keys.has(key) and keys.number(key, SCALE) not in (0.0, 1.0):
            raise keys.unsupported(key, "this feature is not supported")
    keys.ignore("pooling_type")
    by_layer = {name: value for name, value in of_feed_forward.items() if isinstance(value, tuple)}
    by_layer |= {"num_heads": heads, "num_kv_heads": kv_heads, "sliding_window": _windows_of_gguf(keys, layers)}
    config = ModelConfig(
        architecture=family.architecture,
        num_layers=layers,
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=keys.integer("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", EPS),
        rope_theta=theta if theta and not keys.has("rope.freq_base") else keys.number("rope.freq_base", THETA),
        rope_dim=rope_dim,
        rope_scaling=rope.scaling_from_gguf(keys),
        **of_feed_forward | {name: values[0] for name, values in by_layer.items()},
    )
    return config.with_by_layer(**by_layer)


def _windows_of_gguf(keys: Keys, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none. The pattern is either a list that says which layers have one, or a period
    n: of every n layers all but the last have one (0: all layers)."""
    key = "attention.sliding_window_pattern"
    window = keys.integer("attention.sliding_window", low=0) if keys.has("attention.sliding_window") else 0
    pattern = keys.get(key)
    if not isinstance(pattern, np.ndarray):
        period = 0 if pattern is None else keys.integer(key, low=0)
        return tuple(window if not period or number % period < period - 1 else 0 for number in range(layers))
    if len(pattern) != layers:
        raise keys.fail(key, f"has {len(pattern)} values; it must have one for each of the {layers} layers")
    if pattern.dtype.kind not in "biu" or not np.isin(pattern, (0, 1)).all():
        raise keys.fail(key, "must be true or false for each layer")
    return tuple(window if slides else 0 for slides in pattern)


def _head_dim_of_gguf(keys: Keys, hidden: int, heads: tuple[int, ...]) -> int:
    """The file's key_length; without that key the format defines it as hidden / heads."""
    keys.ignore("attention.value_length")
    if not keys.has("attention.key_length"):
        if len(set(heads)) > 1:
            raise keys.fail("attention.key_length", "is missing, and attention.head_count differs from layer to layer")
        if hidden % heads[0]:
            raise keys.fail("attention.key_length", f"is missing and {hidden} is not a multiple of {heads[0]} heads")
        return hidden // heads[0]
    head_dim = keys.integer("attention.key_length", high=2**14)
    value_dim = keys.integer("attention.value_length") if keys.has("attention.value_length") else head_dim
    if value_dim != head_dim:
        text = f"{value_dim} differs from key_length {head_dim}, which is not supported"
        raise keys.unsupported("attention.value_length", text)
    return head_dim


def dense_from_gguf(keys: Keys, layers: int) -> Fields:
    """The keywords about a dense feed-forward; keys about experts have no effect in such a model."""
    keys.ignore("expert_used_count", "expert_feed_forward_length", "expert_weights_norm")
    _require_softmax(keys)
    if keys.has("expert_weights_scale"):
        keys.number("expert_weights_scale", SCALE)
    return {"intermediate_size": keys.integers("feed_forward_length", layers)}


def _require_softmax(keys: Keys) -> None:
    if keys.has("expert_gating_func") and keys.integer("expert_gating_func", low=0) > 1:  # 0: not stated, 1: softmax
        raise keys.unsupported("expert_gating_func", "only softmax (1) is supported")


def mixture_from_gguf(keys: Keys, layers: int, width_key: str) -> Fields:
    """The keywords about mixtures of experts, whose width is under `width_key`; those of a dense feed-forward if there are no
    experts."""
    experts = keys.integer("expert_count", low=0, high=2**16) if keys.has("expert_count") else 0
    if not experts:
        return dense_from_gguf(keys, layers)
    if keys.has("expert_weights_norm") and not keys.boolean("expert_weights_norm"):
        architecture = keys.prefix.removesuffix(".")
        raise keys.unsupported("expert_weights_norm", f"false contradicts how {architecture} files are run")
    scale = keys.number("expert_weights_scale", SCALE) if keys.has("expert_weights_scale") else 0.0
    keys.ignore("feed_forward_length", "expert_feed_forward_length")
    _require_softmax(keys)
    return {
        "num_experts": experts,
        "experts_per_token": keys.integer("expert_used_count", high=experts),
        "expert_intermediate_size": keys.integers(width_key, layers),
        "norm_topk_prob": True,  # files are run with normalized weights whether or not they carry the key
        "expert_weights_scale": scale or 1.0,  # converters write 0 for "none"
    }


def to_gguf(
    config: ModelConfig,
    where: str,
    *,
    width_key: str = "feed_forward_length",
    feed_forward: Callable[[ModelConfig, str], Fields] | None = None,
) -> dict[str, Typed]:
    """Implements `Family.to_gguf`. width_key: the key for the width of experts. feed_forward: gives the keys about experts and
    refuses what cannot be written (None: as llama.cpp reads those of most families)."""
    of_feed_forward = _mixture_to_gguf(config, where, width_key) if feed_forward is None else feed_forward(config, where)
    if isinstance(config.by_layer("sliding_window"), tuple):
        text = "a sliding window in some layers only cannot be written as GGUF: llama.cpp reads no pattern in architecture"
        raise UnsupportedModelError(f"{where}: {text} {config.architecture}")
    if config.rope_scaling is not None and not config.rope_scaling.truncate:
        raise UnsupportedModelError(f"{where}: truncate false cannot be written as GGUF: llama.cpp rounds the range of YaRN")
    values: Fields = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.by_layer("intermediate_size"),
        "attention.head_count": config.by_layer("num_heads"),
        "attention.head_count_kv": config.by_layer("num_kv_heads"),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rope_dim,
        "vocab_size": config.vocab_size,
        "attention.sliding_window": config.sliding_window,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_theta),
    }
    typed = {key: _typed(value) for key, value in (values | of_feed_forward).items() if value}
    typed |= rope.scaling_to_gguf(config.rope_scaling)
    return {f"{config.architecture}.{key}": entry for key, entry in typed.items()}


def _mixture_to_gguf(config: ModelConfig, where: str, width_key: str) -> Fields:
    """The keys about experts, whose width is under `width_key`."""
    if config.dense_layers:
        raise UnsupportedModelError(f"{where}: layers without experts among layers with them cannot be written as GGUF")
    if not config.num_experts:
        return {}
    if not config.norm_topk_prob:
        raise UnsupportedModelError(f"{where}: norm_topk_prob false cannot be written as GGUF: llama.cpp renormalizes always")
    scale = config.expert_weights_scale
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        width_key: config.by_layer("expert_intermediate_size"),
    } | ({} if scale == 1.0 else {"expert_weights_scale": scale})


def _typed(value: Any) -> Typed:
    if isinstance(value, tuple):
        return Typed(np.array(value, np.uint32), "array uint32")
    return Typed(value, "bool" if isinstance(value, bool) else "float32" if isinstance(value, float) else "uint32")


# ---- config.json


def from_json(
    family: Family,
    keys: Keys,
    path: Path,
    *,
    theta: float = 10_000.0,
    head_dim: int | None = None,
    rotated: float | None = None,
    eps_key: str = "rms_norm_eps",
    window: Callable[[Keys, int], tuple[int, ...]] | None = None,
    feed_forward: Callable[[Keys, int], Fields] | None = None,
) -> ConfigFile:
    """Implements `Family.from_json`. theta, head_dim: for files written before the key existed (head_dim None: hidden_size /
    heads). rotated: the part of a head that is rotated if no key says it (None: always the whole head). eps_key: for the number
    inside the root of norms. window: reads the sliding window of each layer, 0 for none (None: the class has no windows).
    feed_forward: reads the keywords of `ModelConfig` about the feed-forward (None: it is dense). Both are called with the
    number of layers."""
    if keys.has("hidden_act") and (act := keys.get("hidden_act")) != "silu":
        raise keys.unsupported("hidden_act", f"{shown(act)} is not supported; supported: 'silu'")
    if not keys.boolean("is_causal", True):
        raise keys.unsupported("is_causal", "false is not supported")
    hidden = keys.integer("hidden_size")
    layers = keys.integer("num_hidden_layers", high=MOST_LAYERS)
    heads = keys.integer("num_attention_heads", high=2**16)
    kv_heads = keys.integer("num_key_value_heads", high=2**16) if keys.has("num_key_value_heads") else heads
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    head_dim = _head_dim_of_json(keys, head_dim, hidden, heads)
    context = keys.integer("max_position_embeddings")
    rope_dim = head_dim if rotated is None else rope.rotated_of_json(keys, head_dim, rotated)
    theta, scaling, factors = rope.from_json(keys, theta, rope_dim, context, partial=rotated is not None)
    if scaling is not None and scaling.kind == "yarn":
        context = max(context, int(scaling.factor * scaling.original_context))
        if context >= 2**31:
            text = f"times {scaling.original_context} original positions is a context of {context}; at most {2**31 - 1} is"
            raise keys.fail("rope_scaling", f"factor {scaling.factor} {text}")
    biases = family.tensors.biased(always=True)
    biases |= {"attn_q", "attn_k", "attn_v", "attn_output"} if keys.boolean("attention_bias", False) else set()
    biases |= {"ffn_gate", "ffn_up", "ffn_down"} if keys.boolean("mlp_bias", False) else set()
    config = ModelConfig(
        architecture=family.architecture,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=keys.integer("vocab_size"),
        context_length=context,
        rms_norm_eps=keys.number(eps_key, EPS),
        rope_theta=theta,
        rope_dim=rope_dim,
        rope_scaling=scaling,
        **(feed_forward or dense_from_json)(keys, layers),
    ).with_by_layer(sliding_window=(window or no_window)(keys, layers))
    return ConfigFile(family, config, keys.boolean("tie_word_embeddings", False), frozenset(biases), factors)


def text_part(text: Family, model_class: str, model_type: str, table: Table) -> Family:
    """The family of texts and pictures whose text part `text` is: that has its keys under `text_config`; the rest is of
    pictures."""

    def from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
        content = keys.get("text_config")
        if not isinstance(content, dict):
            raise keys.fail("text_config", "is missing or not an object")
        keys.ignore(*FIELDS[family.model_type])
        part = "text_config."
        inner = Keys({f"{part}{key}": value for key, value in content.items()}, part, keys.source, FIELDS[text.model_type])
        file = text.from_json(family, inner, path)
        inner.judge(f"{{}} is not supported in a {family.model_class}")
        return dataclasses.replace(file, tied=keys.boolean("tie_word_embeddings", file.tied))

    return dataclasses.replace(text, model_class=model_class, model_type=model_type, tensors=table, from_json=from_json)


def _head_dim_of_json(keys: Keys, default: int | None, hidden: int, heads: int) -> int:
    if keys.has("head_dim"):
        head_dim = keys.integer("head_dim", high=2**14)
    elif default is not None:
        head_dim = default
    elif hidden % heads:
        raise keys.fail("head_dim", f"is missing and {hidden} is not a multiple of {heads} heads")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise keys.fail("head_dim", f"is {head_dim}; it must be even")
    return head_dim


def dense_from_json(keys: Keys, layers: int) -> Fields:
    """The keywords about a dense feed-forward."""
    return {"intermediate_size": keys.integer("intermediate_size")}


def num_experts(keys: Keys, *, low: int, names: tuple[str, str] = ("num_experts", "num_local_experts")) -> int:
    """The number of experts in a layer. Two keys, of these names, may state it; they must agree."""
    named = [key for key in names if keys.has(key)]
    counts = [keys.integer(key, low=low, high=2**16) for key in named or names[1:]]
    if counts[0] != counts[-1]:
        raise keys.fail(names[0], f"is {counts[0]}, but {names[1]} is {counts[-1]}")
    return counts[0]


def no_window(keys: Keys, layers: int) -> tuple[int, ...]:
    """`window` of `from_json` for a class that has no windows."""
    if not is_neutral(keys.get("sliding_window")):
        raise keys.unsupported("sliding_window", "is not supported in this model class")
    return _by_layer(keys, layers, 0)


def stated_window(keys: Keys, layers: int, *, default: int = 0, some: bool = False) -> tuple[int, ...]:
    """`window` of `from_json` for a class that takes `sliding_window` as stated. default: the window if the key is absent.
    some: whether `layer_types` may give the window to only some of the layers."""
    return _by_layer(keys, layers, _window(keys, default), some=some)


def window_on_request(keys: Keys, layers: int) -> tuple[int, ...]:
    """`window` of `from_json` for Qwen, which has one only if `use_sliding_window` is true. If the class has
    `max_window_layers`, the window applies from that layer on, or to the layers that `layer_types` names."""
    window = _window(keys, 4096) if keys.boolean("use_sliding_window", False) else 0
    keys.ignore("sliding_window", "max_window_layers")
    some = "max_window_layers" in (keys.fields or ())
    if window and some and keys.get("layer_types") is None:
        full = min(keys.integer("max_window_layers", low=0) if keys.has("max_window_layers") else 28, layers)
        return (0,) * full + (window,) * (layers - full)
    return _by_layer(keys, layers, window, some=some)


def _window(keys: Keys, default: int) -> int:
    if "sliding_window" not in keys.values:
        return default
    return keys.integer("sliding_window", low=0) if keys.has("sliding_window") else 0


def _by_layer(keys: Keys, layers: int, window: int, *, some: bool = False) -> tuple[int, ...]:
    """The window of each layer, 0 for none, as `layer_types` says."""
    kinds = keys.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise keys.fail("layer_types", f"must be a list of {layers} kinds")
    found = set(map(str, kinds or ()))
    if not found <= {"full_attention", "sliding_attention"} or (window and len(found) > 1 and not some):
        raise keys.unsupported("layer_types", f"{sorted(found)} in one model of this class is not supported")
    if not window and "sliding_attention" in found and (some or len(found) == 1):
        raise keys.fail("layer_types", "names sliding_attention, but there is no sliding_window")
    return tuple(0 if kind == "full_attention" else window for kind in kinds or [""] * layers)
