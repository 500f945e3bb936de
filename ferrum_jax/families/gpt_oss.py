"""gpt-oss (arXiv 2508.10925): attention with sinks, every other layer with a window, clamped experts with biases, and YaRN
whose range of pairs is not rounded.

GGUF files state neither the pattern of the windows nor that the range is not rounded nor the constants of the SwiGLU. They
belong to the published model, so its values are assumed here (llama.cpp rounds the range).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferrum_jax.config import Attention, LayerSpec, ModelConfig
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.table import Part, Tensor
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo

_WIDTH_KEY = "expert_feed_forward_length"
_PATTERN_KEY = "attention.sliding_window_pattern"
_LIMIT, _ALPHA = 7.0, 1.702
_YARN = {  # for files that state no rotation
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def _experts() -> tuple[Tensor, ...]:
    """Router and experts. In directories the experts' rows are the last axis, alternating between gate and up."""
    path, router = "feed_forward", ("mlp.router",)
    found = [
        Tensor("ffn_gate_inp.weight", (path, "router"), ("routed", "hidden"), router, quantize=False),
        Tensor("ffn_gate_inp.bias", (path, "router_bias"), ("routed",), router),
    ]
    for name, axes, tensor, index in (
        ("gate", ("expert", "expert_width", "hidden"), "gate_up_proj", 0),
        ("up", ("expert", "expert_width", "hidden"), "gate_up_proj", 1),
        ("down", ("expert", "hidden", "expert_width"), "down_proj", 0),
    ):
        part = Part(f"mlp.experts.{tensor}", index, interleaved=tensor == "gate_up_proj", rows_last=True)
        bias = dataclasses.replace(part, tensor=f"{part.tensor}_bias")
        found.append(Tensor(f"ffn_{name}_exps.weight", (path, f"expert_{name}"), axes, (part,)))
        found.append(Tensor(f"ffn_{name}_exps.bias", (path, f"expert_{name}_bias"), axes[:2], (bias,), quantize=False))
    return tuple(found)


_SINKS = Tensor("attn_sinks.weight", ("attention", "sinks"), ("query_heads",), (Part("self_attn.sinks", whole=True),))
_ATTENTION = tuple(dataclasses.replace(tensor, optional=False) for tensor in tensors.attention(biased=True))


def _sizes(config: ModelConfig, spec: LayerSpec | None) -> Mapping[str, int | tuple[int, int]]:
    found = tensors.sizes(config, spec)
    return found | {"query_heads": spec.mixer.num_heads} if spec and isinstance(spec.mixer, Attention) else found


def _with(config: ModelConfig, **values: Any) -> ModelConfig:
    """The same configuration with other numbers in all layers."""
    return config.with_by_layer(**{name: (value,) * config.num_layers for name, value in values.items()})


def _alternating(window: int, layers: int) -> tuple[int, ...]:
    """The window of each layer: every other one has it, starting with the first."""
    return tuple(0 if number % 2 else window for number in range(layers))


def _from_gguf(family: Family, keys: Keys, of_file: Mapping[str, TensorInfo]) -> ModelConfig:
    def experts(keys: Keys, layers: int) -> decoder.Fields:
        if not keys.has("expert_count") or not keys.integer("expert_count", low=0):
            raise keys.fail("expert_count", "is missing or zero in a mixture-of-experts model")
        clamp = {"swiglu_limit": _LIMIT, "swiglu_alpha": _ALPHA}
        return decoder.mixture_from_gguf(keys, layers, _WIDTH_KEY) | clamp

    config = decoder.from_gguf(family, keys, of_file, feed_forward=experts)
    if not keys.has(_PATTERN_KEY) and config.sliding_window:
        config = config.with_by_layer(sliding_window=_alternating(config.sliding_window, config.num_layers))
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        config = _with(config, rope_scaling=dataclasses.replace(scaling, truncate=False))
    return _with(config, attention_sinks=True)


def _from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    if not keys.boolean("attention_bias", True):
        raise keys.unsupported("attention_bias", "false is not supported")
    if not keys.has("rope_scaling") and not keys.has("rope_parameters"):
        keys.values["rope_parameters"] = _YARN

    def number(key: str, default: float) -> float:
        return keys.number(key) if keys.has(key) else default

    def experts(keys: Keys, layers: int) -> decoder.Fields:
        count = decoder.num_experts(keys, low=1)
        return {
            "num_experts": count,
            "experts_per_token": keys.integer("num_experts_per_tok", high=count),
            "expert_intermediate_size": keys.integer("intermediate_size"),
            "norm_topk_prob": True,  # a softmax over the chosen alone
            "swiglu_limit": number("swiglu_limit", _LIMIT),
            "swiglu_alpha": number("swiglu_alpha", _ALPHA),
        }

    def windows(keys: Keys, layers: int) -> tuple[int, ...]:
        found = decoder.stated_window(keys, layers, default=128, some=True)
        return found if keys.has("layer_types") else _alternating(found[0], layers)

    file = decoder.from_json(family, keys, path, theta=150_000.0, head_dim=64, window=windows, feed_forward=experts)
    assert isinstance(file.config, ModelConfig)
    return dataclasses.replace(file, config=_with(file.config, attention_sinks=True))


def _to_gguf(config: ModelConfig, where: str) -> dict[str, Typed]:
    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{where}: {what} cannot be written as GGUF: files of {config.architecture} do not state it"
        )

    windows = tuple(mixer.window for mixer in config.attentions)
    if windows != _alternating(windows[0], config.num_layers):
        raise refuse("windows that are not those of every other layer from the first one on")
    if (config.swiglu_limit, config.swiglu_alpha) != (_LIMIT, _ALPHA):
        raise refuse(f"a SwiGLU with limit {config.swiglu_limit} and alpha {config.swiglu_alpha}")
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn" and config.rope_scaling.truncate:
        raise refuse("YaRN with truncate true")
    same: dict[str, Any] = {"sliding_window": windows[0]}
    if config.rope_scaling is not None:
        same["rope_scaling"] = dataclasses.replace(config.rope_scaling, truncate=True)
    return decoder.to_gguf(_with(config, **same), where, width_key=_WIDTH_KEY)


GPT_OSS = Family(
    architecture="gpt-oss",
    model_class="GptOssForCausalLM",
    model_type="gpt_oss",
    tensors=tensors.decoder((*_ATTENTION, _SINKS, tensors.POST_ATTENTION_NORM, *_experts())),
    sizes=_sizes,
    from_gguf=_from_gguf,
    from_json=_from_json,
    to_gguf=_to_gguf,
    windows_in_gguf=True,
)
