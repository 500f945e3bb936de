"""LFM2, dense and with mixtures of experts: layers that recur by a short convolution and layers that attend.

In GGUF files a layer that recurs has no heads of keys, and the norm after the last layer is called as if it belonged to the
embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ferrum_jax.config import Attention, LayerSpec, ModelConfig, ShortConv
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, grouped, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.keys import SCALE, Keys
from ferrum_jax.families.table import Change, Tensor
from ferrum_jax.files.metadata import Typed

if TYPE_CHECKING:
    from ferrum_jax.files.tensor_info import TensorInfo

_HEADS_KEY = "attention.head_count_kv"
_EPS = 1e-6  # which transformers adds to the sum of weights
FeedForward = Callable[[Keys, int], decoder.Fields]


# ---- tensors


def _attends(spec: LayerSpec) -> bool:
    return isinstance(spec.mixer, Attention)


def _recurs(spec: LayerSpec) -> bool:
    return isinstance(spec.mixer, ShortConv)


def _mixers() -> tuple[Tensor, ...]:
    modules: dict[str, tuple[str, ...]] = {
        "attn_output": ("self_attn.out_proj",),
        "attn_q_norm": ("self_attn.q_layernorm",),
        "attn_k_norm": ("self_attn.k_layernorm",),
    }
    rows = (*tensors.attention()[1:5], *tensors.HEAD_NORMS)
    attention = (dataclasses.replace(row, modules=modules.get(row.stem, row.modules), layers=_attends) for row in rows)
    taps = Change("conv.conv.weight", values=np.copy)
    path = "short_conv"
    return (
        *attention,
        Tensor("shortconv.in_proj.weight", (path, "into"), ("gated_channels", "hidden"), ("conv.in_proj",), _recurs),
        Tensor("shortconv.conv.weight", (path, "taps"), ("channels", "taps"), (taps,), _recurs, quantize=False),
        Tensor("shortconv.out_proj.weight", (path, "output"), ("hidden", "channels"), ("conv.out_proj",), _recurs),
    )


def _renamed(row: Tensor) -> Tensor:
    """A tensor of the feed-forward, with its names here."""
    letter = next((letter for name, letter in (("gate", "w1"), ("up", "w3"), ("down", "w2")) if f"ffn_{name}" in row.name), "")
    module = "gate" if row.name == "ffn_gate_inp.weight" else f"experts.*.{letter}" if "_exps" in row.name else letter
    return dataclasses.replace(row, modules=(f"feed_forward.{module}",))


_WHOLE = (
    tensors.EMBEDDINGS[0],
    Tensor("token_embd_norm.weight", ("final_norm",), ("hidden",), ("model.embedding_norm",)),
    tensors.EMBEDDINGS[2],
)
_NORMS = (
    Tensor("attn_norm.weight", ("attention_norm",), ("hidden",), ("operator_norm",)),
    Tensor("ffn_norm.weight", ("feed_forward_norm",), ("hidden",), ("ffn_norm",)),
)
_DENSE = tuple(map(_renamed, tensors.dense()))
_BIAS = grouped.selection_bias("feed_forward.expert_bias", optional=True)
_MIXTURE = (*map(_renamed, tensors.mixture()), _BIAS)


def _sizes(config: ModelConfig, spec: LayerSpec | None) -> Mapping[str, int | tuple[int, int]]:
    found = tensors.sizes(config, spec)
    if spec is None or not isinstance(spec.mixer, ShortConv):
        return found
    width = spec.mixer.width
    return found | {"channels": width, "gated_channels": 3 * width, "taps": spec.mixer.taps}


# ---- keys


def _with_convolutions(config: ModelConfig, recurs: Sequence[bool], taps: int) -> ModelConfig:
    mixer = ShortConv(config.hidden_size, taps)
    layers = (
        dataclasses.replace(spec, mixer=mixer) if of_layer else spec
        for spec, of_layer in zip(config.layers, recurs, strict=True)
    )
    return dataclasses.replace(config, layers=tuple(layers))


def _from_gguf(
    family: Family, keys: Keys, found: Mapping[str, TensorInfo], *, feed_forward: FeedForward | None = None
) -> ModelConfig:
    counts = keys.get(_HEADS_KEY)
    if not isinstance(counts, np.ndarray):
        raise keys.fail(_HEADS_KEY, "must be a list, with 0 for layers that recur")
    keys.values[_HEADS_KEY] = np.where(counts == 0, counts.max(initial=0), counts)
    config = decoder.from_gguf(family, keys, found, feed_forward=feed_forward)
    return _with_convolutions(config, list(counts == 0), keys.integer("shortconv.l_cache", low=2, high=64))


def _experts_of_gguf(keys: Keys, layers: int) -> decoder.Fields:
    keys.ignore("expert_weights_norm")  # weights are normalized, whether or not files say so
    return grouped.from_gguf(keys, layers, scoring="sigmoid") | {"norm_topk_prob": True, "router_eps": _EPS}


def _from_json(family: Family, keys: Keys, path: Path, *, feed_forward: FeedForward) -> ConfigFile:
    recurs: list[bool] = []

    def windows(keys: Keys, layers: int) -> tuple[int, ...]:
        recurs.extend(_recurrent_of_json(keys, layers))
        return (0,) * layers

    if keys.boolean("conv_bias", False):
        raise keys.unsupported("conv_bias", "true is not supported")
    file = decoder.from_json(family, keys, path, theta=1e6, eps_key="norm_eps", window=windows, feed_forward=feed_forward)
    taps = keys.integer("conv_L_cache", low=2, high=64) if keys.has("conv_L_cache") else 3
    tied = keys.boolean("tie_embedding", keys.boolean("tie_word_embeddings", True))
    assert isinstance(file.config, ModelConfig)
    return dataclasses.replace(file, config=_with_convolutions(file.config, recurs, taps), tied=tied)


def _recurrent_of_json(keys: Keys, layers: int) -> list[bool]:
    """Which layers recur: those that `layer_types` names, else all but those of `full_attn_idxs`."""
    attending, kinds = keys.get("full_attn_idxs"), keys.get("layer_types")
    if kinds is None:
        return [attending is not None and number not in attending for number in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise keys.fail("layer_types", f"must be a list of {layers} kinds")
    if unknown := set(map(str, kinds)) - {"conv", "full_attention"}:
        raise keys.unsupported("layer_types", f"{sorted(unknown)} in this model class is not supported")
    return [kind == "conv" for kind in kinds]


def _dense_of_json(keys: Keys, layers: int) -> decoder.Fields:
    """The width is two thirds of what is stated, times a factor and rounded up, unless the file says otherwise."""
    width = keys.integer("block_ff_dim" if keys.has("block_ff_dim") else "intermediate_size")
    keys.ignore("intermediate_size", "block_ffn_dim_multiplier", "block_multiple_of")
    if keys.boolean("block_auto_adjust_ff_dim", True):
        factor = keys.number("block_ffn_dim_multiplier", SCALE) if keys.has("block_ffn_dim_multiplier") else 1.0
        multiple = keys.integer("block_multiple_of") if keys.has("block_multiple_of") else 256
        width = -(-int(factor * int(2 * width / 3)) // multiple) * multiple
    return {"intermediate_size": width}


def _experts_of_json(keys: Keys, layers: int) -> decoder.Fields:
    count = decoder.num_experts(keys, low=1)
    dense = keys.integer("num_dense_layers", low=0, high=layers - 1) if keys.has("num_dense_layers") else 2
    keys.ignore("intermediate_size")
    normalize = keys.boolean("norm_topk_prob", True)
    return {
        "num_experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", high=count),
        "expert_intermediate_size": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": normalize,
        "expert_weights_scale": keys.number("routed_scaling_factor", SCALE) if keys.has("routed_scaling_factor") else 1.0,
        "router_scoring": "sigmoid",
        "router_eps": _EPS if normalize else 0.0,
        "dense_layers": range(dense),
        "intermediate_size": keys.integer("intermediate_size") if dense else 0,
    }


def _moe_from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    file = _from_json(family, keys, path, feed_forward=_experts_of_json)
    return dataclasses.replace(file, optional={_BIAS.name: keys.boolean("use_expert_bias", True)})


def _to_gguf(
    config: ModelConfig, where: str, *, feed_forward: Callable[[ModelConfig, str], decoder.Fields] | None = None
) -> dict[str, Typed]:
    taps = next((spec.mixer.taps for spec in config.layers if isinstance(spec.mixer, ShortConv)), 3)
    heads = [spec.mixer.num_kv_heads if isinstance(spec.mixer, Attention) else 0 for spec in config.layers]
    own = {
        _HEADS_KEY: Typed(np.array(heads, np.uint32), "array uint32"),
        "shortconv.l_cache": Typed(taps, "uint32"),
    }
    typed = decoder.to_gguf(config, where, feed_forward=feed_forward)
    return typed | {f"{config.architecture}.{key}": value for key, value in own.items()}


def _experts_to_gguf(config: ModelConfig, where: str) -> decoder.Fields:
    if not config.norm_topk_prob or config.expert_weights_scale != 1.0:
        raise UnsupportedModelError(
            f"{where}: weights of experts that are not normalized, or have a scale, cannot be written as GGUF: llama.cpp "
            f"normalizes always in {config.architecture}"
        )
    return grouped.to_gguf(config, where)


LFM2 = Family(
    architecture="lfm2",
    model_class="Lfm2ForCausalLM",
    model_type="lfm2",
    tensors=tensors.decoder((*_NORMS, *_mixers(), *_DENSE), _WHOLE),
    sizes=_sizes,
    from_gguf=_from_gguf,
    from_json=partial(_from_json, feed_forward=_dense_of_json),
    to_gguf=_to_gguf,
)
LFM2_MOE = dataclasses.replace(
    LFM2,
    architecture="lfm2moe",
    model_class="Lfm2MoeForCausalLM",
    model_type="lfm2_moe",
    tensors=tensors.decoder((*_NORMS, *_mixers(), *_DENSE, *_MIXTURE), _WHOLE),
    from_gguf=partial(_from_gguf, feed_forward=_experts_of_gguf),
    from_json=_moe_from_json,
    to_gguf=partial(_to_gguf, feed_forward=_experts_to_gguf),
)
