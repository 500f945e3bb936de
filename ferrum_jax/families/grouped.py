"""Mixtures of experts as DeepSeek-V3 has them (arXiv 2412.19437), which other families took over: a bias that only the choice
sees, groups of experts, an expert for all tokens, and dense layers before those with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.decoder import Fields
from ferrum_jax.families.keys import SCALE, Keys
from ferrum_jax.families.table import Change, Tensor

_SCORINGS = {"softmax": 1, "sigmoid": 2}  # and the numbers that stand for them in GGUF files
_EPS = 1e-20  # which transformers adds to the sum of weights


def selection_bias(tensor: str, *, optional: bool) -> Tensor:
    """The bias that only the choice sees, by its name in directories. optional: as of `Tensor`."""
    path, change = ("feed_forward", "selection_bias"), Change(tensor, values=np.copy)
    return Tensor("exp_probs_b.bias", path, ("routed",), (change,), tensors.is_mixture, optional=optional)


def feed_forward(*, biased: bool) -> tuple[Tensor, ...]:
    """The tensors of dense layers and of mixtures. biased: the bias of the choice is always there; otherwise it may be."""
    bias = selection_bias("mlp.gate.e_score_correction_bias", optional=not biased)
    return (*tensors.dense(), *tensors.mixture(), bias, *tensors.shared_expert("mlp.shared_experts"))


def from_gguf(keys: Keys, layers: int, *, scoring: str) -> Fields:
    """`feed_forward` of `decoder.from_gguf`. scoring: of files that do not state it."""
    key, known = "expert_gating_func", {0: scoring} | {number: name for name, number in _SCORINGS.items()}
    number = keys.integer(key, low=0) if keys.has(key) else 0
    if number not in known:
        raise keys.unsupported(key, f"is {number}; only softmax (1) and sigmoid (2) are supported")

    def integer(key: str, default: int, high: int) -> int:
        return keys.integer(key, low=0, high=high) if keys.has(key) else default

    count, width = keys.integer("expert_count", high=2**16), keys.integer("expert_feed_forward_length")
    scale = keys.number("expert_weights_scale", SCALE) if keys.has("expert_weights_scale") else 0.0
    dense = integer("leading_dense_block_count", 0, layers - 1)
    keys.ignore("feed_forward_length")
    groups = "expert_group_count", "expert_group_used_count"
    fields = {
        "num_experts": count,
        "experts_per_token": keys.integer("expert_used_count", high=count),
        "expert_intermediate_size": width,
        "shared_expert_size": integer("expert_shared_count", 0, 2**16) * width,
        "norm_topk_prob": keys.boolean("expert_weights_norm", False),
        "expert_weights_scale": scale or 1.0,
        "router_scoring": known[number],
        "expert_groups": integer(groups[0], 0, count) or 1,
        "expert_groups_used": integer(groups[1], 0, count) or 1,
        "dense_layers": range(dense),
        "intermediate_size": keys.integer("feed_forward_length") if dense else 0,
    }
    return _grouped(keys, groups, fields)


def from_json(keys: Keys, layers: int, *, scoring: str = "sigmoid", defaults: Mapping[str, Any]) -> Fields:
    """`feed_forward` of `decoder.from_json`. defaults: what the class has for keys that are not there."""

    def integer(key: str, high: int = 2**31 - 1, low: int = 0) -> int:
        return keys.integer(key, low=low, high=high) if keys.has(key) or key not in defaults else int(defaults[key])

    count = decoder.num_experts(keys, low=1, names=("num_local_experts", "n_routed_experts"))
    width, dense = integer("moe_intermediate_size", low=1), integer("first_k_dense_replace", layers - 1)
    scale = "routed_scaling_factor"
    keys.ignore("intermediate_size")
    groups = "n_group", "topk_group"
    fields = {
        "num_experts": count,
        "experts_per_token": integer("num_experts_per_tok", count, 1),
        "expert_intermediate_size": width,
        "shared_expert_size": integer("n_shared_experts", 2**16) * width,
        "norm_topk_prob": keys.boolean("norm_topk_prob", defaults["norm_topk_prob"]),
        "expert_weights_scale": keys.number(scale, SCALE) if keys.has(scale) else defaults[scale],
        "router_scoring": scoring,
        "expert_groups": integer(groups[0], count, 1),
        "expert_groups_used": integer(groups[1], count, 1),
        "dense_layers": range(dense),
        "intermediate_size": integer("intermediate_size", low=1) if dense else 0,
    }
    return _grouped(keys, groups, fields)


def _grouped(keys: Keys, names: tuple[str, str], fields: Fields) -> Fields:
    """The keywords, checked and with what follows from them. names: the keys of the groups. A group is as good as its two best
    experts with sigmoids, as its best one with a softmax (DeepSeek-V2)."""
    count, top_k = fields["num_experts"], fields["experts_per_token"]
    groups, used = fields["expert_groups"], fields["expert_groups_used"]
    best = 1 if groups == 1 or fields["router_scoring"] == "softmax" else 2
    if count % groups or count // groups < best:
        raise keys.fail(names[0], f"{groups} does not divide {count} experts into groups of at least {best}")
    if used > groups or used * (count // groups) < top_k:
        raise keys.fail(
            names[1], f"is {used}; it must be from 1 to {groups}, and so large that the groups have {top_k} experts"
        )
    return fields | {"expert_group_best": best, "router_eps": _EPS if fields["norm_topk_prob"] else 0.0}


def to_gguf(config: ModelConfig, where: str) -> Fields:
    """`feed_forward` of `decoder.to_gguf`."""
    dense, width = config.dense_layers, config.expert_intermediate_size
    if dense != tuple(range(len(dense))):
        raise UnsupportedModelError(f"{where}: dense layers after layers with experts cannot be written as GGUF")
    return {
        "leading_dense_block_count": len(dense),
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": width,
        "expert_shared_count": config.shared_expert_size // width,
        "expert_gating_func": _SCORINGS[config.router_scoring],
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": config.expert_weights_scale,
        "expert_group_count": config.expert_groups,
        "expert_group_used_count": config.expert_groups_used,
    }
