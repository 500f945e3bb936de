"""Qwen3-Next: layers that recur and layers that attend, mixtures of experts in all layers or in some.

Directories have queries, keys, values and gates of each key head one after the other in a single matrix. GGUF files have all
queries, all keys, all values, and the gates in a separate matrix; value heads keep their order. Older files have the matrix of
directories, as `ssm_in`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ferrum_jax.config import LayerSpec
from ferrum_jax.families import delta_net, tensors
from ferrum_jax.families.delta_net import recurrent
from ferrum_jax.families.family import Family
from ferrum_jax.families.qwen3moe import experts_of_gguf, experts_of_json
from ferrum_jax.families.table import Change


def _grouped(spec: LayerSpec) -> list[np.ndarray]:
    """The rows of queries, keys, values and gates in the matrix of directories."""
    mixer = delta_net.mixer_of(spec)
    values = mixer.value_heads // mixer.key_heads * mixer.value_dim
    cuts = np.cumsum([mixer.key_dim, mixer.key_dim, values])
    rows = np.arange(mixer.key_heads * (cuts[-1] + values)).reshape(mixer.key_heads, -1)
    return [part.reshape(-1) for part in np.split(rows, cuts, axis=1)]


def _qkv(spec: LayerSpec) -> np.ndarray:
    return np.concatenate(_grouped(spec)[:3])


def _gate(spec: LayerSpec) -> np.ndarray:
    return _grouped(spec)[3]


_QKVZ, _OLDER = "linear_attn.in_proj_qkvz.weight", "ssm_in.weight"
_MIXER = (
    recurrent("attn_qkv", "qkv", ("channels", "hidden"), Change(_QKVZ, _qkv), elsewhere=Change(_OLDER, _qkv)),
    recurrent("attn_gate", "gate", ("values", "hidden"), Change(_QKVZ, _gate), elsewhere=Change(_OLDER, _gate)),
    recurrent("ssm_ba", "beta_alpha", ("beta_alpha", "hidden"), "linear_attn.in_proj_ba"),
    *delta_net.vectors(),
    recurrent("ssm_out", "output", ("hidden", "values"), "linear_attn.out_proj"),
)

QWEN3_NEXT = Family(
    architecture="qwen3next",
    model_class="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    tensors=delta_net.table((*_MIXER, *tensors.dense(), *tensors.mixture(), *delta_net.shared_expert())),
    sizes=delta_net.sizes,
    from_gguf=partial(delta_net.from_gguf, tiled=False, feed_forward=experts_of_gguf),
    from_json=partial(delta_net.from_json, tiled=False, feed_forward=experts_of_json),
    to_gguf=partial(delta_net.to_gguf, width_key="expert_feed_forward_length"),
    predicts=True,
)
