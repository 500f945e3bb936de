"""Qwen3.5, 3.6 and 3.8, dense and with mixtures of experts (the text part; vision and multi-token prediction are ignored).

GGUF files have the value heads tiled: the first of all key heads, then the second, so that value head h has key head
h % key_heads.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ferrum_jax.config import LayerSpec, ModelConfig
from ferrum_jax.families import decoder, delta_net, tensors
from ferrum_jax.families.delta_net import recurrent, tiled_heads
from ferrum_jax.families.family import Family
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.qwen3moe import experts_of_gguf
from ferrum_jax.families.table import Change, Tensor
from ferrum_jax.files.metadata import Typed

_WIDTH_KEY = "expert_feed_forward_length"


def _heads(spec: LayerSpec) -> np.ndarray:
    return tiled_heads(spec, 1)


def _values(spec: LayerSpec) -> np.ndarray:
    return tiled_heads(spec, delta_net.mixer_of(spec).value_dim)


def _channels(spec: LayerSpec) -> np.ndarray:
    mixer = delta_net.mixer_of(spec)
    before = 2 * mixer.key_heads * mixer.key_dim
    return np.concatenate([np.arange(before), before + _values(spec)])


def _changed(module: str, rows: delta_net.Rows) -> Change:
    return Change(f"linear_attn.{module}.weight", rows)


_MIXER = (
    recurrent("attn_qkv", "qkv", ("channels", "hidden"), _changed("in_proj_qkv", _channels)),
    recurrent("attn_gate", "gate", ("values", "hidden"), _changed("in_proj_z", _values)),
    recurrent("ssm_beta", "beta", ("value_heads", "hidden"), _changed("in_proj_b", _heads)),
    recurrent("ssm_alpha", "alpha", ("value_heads", "hidden"), _changed("in_proj_a", _heads)),
    *delta_net.vectors(_heads, _channels),
    recurrent("ssm_out", "output", ("hidden", "values"), Change("linear_attn.out_proj.weight", columns=_values)),
)


def _experts_of_json(keys: Keys, layers: int) -> decoder.Fields:
    count = decoder.num_experts(keys, low=1)
    return {
        "num_experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", high=count),
        "expert_intermediate_size": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": True,
    }


def _to_gguf(config: ModelConfig, where: str, **more: str) -> dict[str, Typed]:
    """With a key that llama.cpp requires: how many pairs are rotated by each of the positions in a picture."""
    pairs = config.rope_dim // 2
    sections = [11, 11, 10, 0] if pairs == 32 else [pairs, 0, 0, 0]
    typed = Typed(np.array(sections, np.int32), "array int32")
    return delta_net.to_gguf(config, where, **more) | {f"{config.architecture}.rope.dimension_sections": typed}


def _family(
    architecture: str, model_class: str, model_type: str, feed_forward: tuple[Tensor, ...], experts: bool
) -> tuple[Family, Family]:
    """The text model, and the model of texts and pictures whose text part it is."""
    layer = (*_MIXER, *feed_forward)
    text = Family(
        architecture=architecture,
        model_class=f"{model_class}ForCausalLM",
        model_type=f"{model_type}_text",
        tensors=delta_net.table(layer),
        sizes=delta_net.sizes,
        from_gguf=partial(delta_net.from_gguf, tiled=True, feed_forward=experts_of_gguf if experts else None),
        from_json=partial(delta_net.from_json, tiled=True, feed_forward=_experts_of_json if experts else None),
        to_gguf=partial(_to_gguf, width_key=_WIDTH_KEY) if experts else _to_gguf,
        predicts=True,
    )

    table = delta_net.table(layer, "model.language_model.")
    return text, decoder.text_part(text, f"{model_class}ForConditionalGeneration", model_type, table)


QWEN35, QWEN35_VISION = _family("qwen35", "Qwen3_5", "qwen3_5", tensors.dense(), experts=False)
QWEN35_MOE, QWEN35_MOE_VISION = _family(
    "qwen35moe", "Qwen3_5Moe", "qwen3_5_moe", (*tensors.mixture(), *delta_net.shared_expert()), experts=True
)
