"""Gemma 3 (arXiv 2503.19786): texts, and the text part of the models of texts and pictures.

Layers with a window alternate with layers that see everything, and each kind has a rotation of its own. GGUF files state
neither which layers have the window nor the scale of the scores, so llama.cpp's values are assumed here: five layers of six,
and 1 / sqrt(key_length), except in the model of 62 layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import Attention, Dense, LayerSpec, ModelConfig, Rope
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, rope, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.keys import THETA, Keys, shown
from ferrum_jax.families.table import Table, Tensor
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo

PATTERN_KEY = "attention.sliding_window_pattern"
_PERIOD = 6  # of layers, the last of which has no window
_THETA, _LOCAL_THETA = 1e6, 1e4
_LAYERS_27B = 62
_DEFAULTS = {  # of transformers' class, whose published files state only what differs
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}

# ---- tensors

_norm = tensors.shifted_norm
_LAYER = (
    _norm("attn_norm", ("attention_norm",), "hidden", "input_layernorm"),
    _norm("post_attention_norm", ("attention_output_norm",), "hidden", "post_attention_layernorm"),
    _norm("ffn_norm", ("feed_forward_norm",), "hidden", "pre_feedforward_layernorm"),
    _norm("post_ffw_norm", ("feed_forward_output_norm",), "hidden", "post_feedforward_layernorm"),
    *tensors.attention()[1:5],
    _norm("attn_q_norm", ("attention", "query_norm"), "head", "self_attn.q_norm"),
    _norm("attn_k_norm", ("attention", "key_norm"), "head", "self_attn.k_norm"),
    *tensors.dense(),
)


def _table(*roots: str, head: str = "lm_head", passed_over: str = "") -> Table:
    """roots: the beginnings of the names of modules in directories, one or two."""
    whole = (
        Tensor("token_embd.weight", ("embedding",), ("vocab", "hidden"), tuple(f"{root}embed_tokens" for root in roots)),
        _norm("output_norm", ("final_norm",), "hidden", *(f"{root}norm" for root in roots)),
        Tensor("output.weight", ("unembedding",), ("vocab", "hidden"), tuple(dict.fromkeys((head, "lm_head"))), optional=True),
    )
    prefix, *other = (f"{root}layers." for root in roots)
    return Table(whole, _LAYER, prefix, tensors.IGNORED, passed_over, *other)


# ---- keys


def _from_gguf(family: Family, keys: Keys, found: Mapping[str, TensorInfo]) -> ModelConfig:
    config = decoder.from_gguf(family, keys, found)
    if not keys.has(PATTERN_KEY) and config.sliding_window:
        windows = default_windows(config.sliding_window, config.num_layers)
        config = config.with_by_layer(sliding_window=windows)
    local = keys.number("rope.freq_base_swa", THETA) if keys.has("rope.freq_base_swa") else _LOCAL_THETA
    return _config(config, _scale_of_gguf(config), lambda full: Rope(local, full.dim), softcap(keys))


def default_windows(window: int, layers: int, period: int = _PERIOD) -> tuple[int, ...]:
    """The window of each layer: all but every `period`-th have it."""
    return tuple(window if (number + 1) % period else 0 for number in range(layers))


def _scale_of_gguf(config: ModelConfig) -> float:
    """The scale of the scores that llama.cpp takes; as of `Attention`."""
    if config.num_layers == _LAYERS_27B:
        return (config.hidden_size // config.attentions[0].num_heads) ** -0.5
    return 0.0


def softcap(keys: Keys) -> float:
    """The `logit_softcap`; GGUF files and directories call it the same."""
    key = "final_logit_softcapping"
    return keys.number(key) if keys.has(key) else 0.0


def _config(config: ModelConfig, scale: float, local: Any, cap: float) -> ModelConfig:
    """The configuration with the scale of the scores, the rotation local(that of layers without a window) of those with one,
    and what is the same in all such models."""

    def layer(spec: LayerSpec) -> LayerSpec:
        mixer, feed_forward = spec.mixer, spec.feed_forward
        assert isinstance(mixer, Attention) and isinstance(feed_forward, Dense)
        turned = local(mixer.rope) if mixer.window else mixer.rope
        return LayerSpec(dataclasses.replace(mixer, scale=scale, rope=turned), Dense(feed_forward.width, "gelu_tanh"))

    layers = tuple(map(layer, config.layers))
    return dataclasses.replace(config, layers=layers, embedding_scale=config.hidden_size**0.5, logit_softcap=cap)


def _from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    complete(keys, _DEFAULTS)
    full, sliding = ropes_of_json(keys)
    if (scaling := keys.get("rope_scaling")) is not None:
        if not isinstance(scaling, dict):
            raise keys.fail("rope_scaling", "must be an object")
        full |= scaling
    keys.values |= {"rope_scaling": None, "rope_parameters": full}
    file = decoder.from_json(family, keys, path, theta=_THETA, window=_windows_of_json)
    if file.rope_factors is not None:
        raise keys.unsupported("rope_parameters", f"{shown(full)} is not supported in this model class")
    config = file.config
    assert isinstance(config, ModelConfig)
    place = Keys({"rope_parameters": sliding, "rope_theta": keys.get("rope_local_base_freq")}, "", keys.source)
    theta, scaled, _ = rope.from_json(place, _LOCAL_THETA, config.rope_dim, config.context_length)
    scalar = keys.number("query_pre_attn_scalar")
    scale = 0.0 if scalar == config.head_dim else scalar**-0.5
    cap = softcap(keys)
    return dataclasses.replace(file, config=_config(config, scale, lambda full: Rope(theta, full.dim, scaled), cap))


def complete(keys: Keys, defaults: Mapping[str, object]) -> None:
    """Gives the keys that are absent the class's values, and refuses what no Gemma has."""
    keys.values |= {key: value for key, value in defaults.items() if not keys.has(key)}
    act = keys.get("hidden_activation")
    if act not in (None, "gelu_pytorch_tanh"):
        raise keys.unsupported("hidden_activation", f"{shown(act)} is not supported; supported: 'gelu_pytorch_tanh'")
    if keys.boolean("attention_bias", False):
        raise keys.unsupported("attention_bias", "true is not supported in this model class")


def ropes_of_json(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects that state the rotation of layers without and with a window."""
    stated = keys.get("rope_parameters") or {}
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(stated, dict) or not all(isinstance(value, dict | None) for value in stated.values()):
        raise keys.unsupported("rope_parameters", f"must have objects under {' and '.join(kinds)}")
    if unknown := sorted(set(stated) - set(kinds)):
        raise keys.unsupported("rope_parameters", f"{shown(unknown[0])} is not supported; supported: {', '.join(kinds)}")
    full, sliding = (dict(stated.get(kind) or {}) for kind in kinds)
    return full, sliding


def _windows_of_json(keys: Keys, layers: int) -> tuple[int, ...]:
    windows = decoder.stated_window(keys, layers, default=4096, some=True)
    period = keys.integer("sliding_window_pattern") if keys.has("sliding_window_pattern") else _PERIOD
    return windows if keys.has("layer_types") else default_windows(windows[0], layers, period)


def _to_gguf(config: ModelConfig, where: str) -> dict[str, Typed]:
    mixers = config.attentions
    if any(abs(mixer.score_scale / (_scale_of_gguf(config) or mixer.head_dim**-0.5) - 1) > 1e-6 for mixer in mixers):
        raise UnsupportedModelError(
            f"{where}: key query_pre_attn_scalar: {mixers[0].score_scale ** -2:g} cannot be written as GGUF: llama.cpp takes "
            f"{_scale_of_gguf(config) ** -2 if _scale_of_gguf(config) else mixers[0].head_dim:g}"
        )
    return windows_to_gguf(config, where, _PERIOD)


def windows_to_gguf(
    config: ModelConfig,
    where: str,
    period: int = 0,
    feed_forward: Callable[[ModelConfig, str], decoder.Fields] | None = None,
) -> dict[str, Typed]:
    """As `Family.to_gguf`, with the keys of layers with and without a window. period: the pattern that llama.cpp assumes (0:
    the file must state it); feed_forward: as of `decoder.to_gguf`."""
    windows = tuple(mixer.window for mixer in config.attentions)
    local = next((mixer for mixer in config.attentions if mixer.window), None)
    full = next((mixer for mixer in config.attentions if not mixer.window), config.attentions[0])
    if local is not None and local.rope.scaling is not None:
        raise UnsupportedModelError(f"{where}: a scaled rotation in layers with a window cannot be written as GGUF")
    same: dict[str, Any] = {
        "sliding_window": max(windows),
        "head_dim": full.head_dim,
        "rope_theta": full.rope.theta,
        "rope_dim": full.rope.dim,
        "rope_scaling": full.rope.scaling,
    }
    typed = decoder.to_gguf(dataclasses.replace(config, **same), where, feed_forward=feed_forward)
    own = {}
    if local is not None:
        own["rope.freq_base_swa"] = Typed(local.rope.theta, "float32")
        if not period or windows != default_windows(max(windows), config.num_layers, period):
            own[PATTERN_KEY] = Typed(np.array(windows, bool), "array bool")
    if config.logit_softcap:
        own["final_logit_softcapping"] = Typed(config.logit_softcap, "float32")
    return typed | {f"{config.architecture}.{key}": entry for key, entry in own.items()}


GEMMA3 = Family(
    architecture="gemma3",
    model_class="Gemma3ForCausalLM",
    model_type="gemma3_text",
    tensors=_table("model."),
    sizes=tensors.sizes,
    from_gguf=_from_gguf,
    from_json=_from_json,
    to_gguf=_to_gguf,
    windows_in_gguf=True,
)
GEMMA3_VISION = decoder.text_part(
    GEMMA3,
    "Gemma3ForConditionalGeneration",
    "gemma3",
    _table(
        "language_model.model.",
        "model.language_model.",
        head="language_model.lm_head",
        passed_over=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    ),
)
