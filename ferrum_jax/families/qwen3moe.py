"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with mixtures of experts, in all layers or in some."""

from functools import partial

from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import Family
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.qwen3 import ATTENTION

_WIDTH_KEY = "expert_feed_forward_length"


def experts_of_gguf(keys: Keys, layers: int) -> decoder.Fields:
    """Keywords about the experts, which there must be."""
    if not keys.has("expert_count") or not keys.integer("expert_count", low=0):
        raise keys.fail("expert_count", "is missing or zero in a mixture-of-experts model")
    return decoder.mixture_from_gguf(keys, layers, _WIDTH_KEY)


def experts_of_json(keys: Keys, layers: int) -> decoder.Fields:
    """Layers named in `mlp_only_layers` are dense, as are all but every `decoder_sparse_step`-th."""
    count = decoder.num_experts(keys, low=0)
    step = keys.integer("decoder_sparse_step") if keys.has("decoder_sparse_step") else 1
    only = keys.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(n) is int and 0 <= n < layers for n in only):
        raise keys.fail("mlp_only_layers", f"must be a list of layers from 0 to {layers - 1}, not {only!r:.100}")
    dense = tuple(n for n in range(layers) if n in only or not count or (n + 1) % step)
    keys.ignore("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "intermediate_size")
    if len(dense) == layers:
        return decoder.dense_from_json(keys, layers)
    return {
        "num_experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", high=count),
        "expert_intermediate_size": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": keys.boolean("norm_topk_prob", False),
        "dense_layers": dense,
        "intermediate_size": keys.integer("intermediate_size") if dense else 0,
    }


QWEN3_MOE = Family(
    architecture="qwen3moe",
    model_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    tensors=tensors.decoder((*ATTENTION, *tensors.dense(), *tensors.mixture())),
    sizes=tensors.sizes,
    from_gguf=partial(decoder.from_gguf, feed_forward=experts_of_gguf),
    from_json=partial(decoder.from_json, window=decoder.window_on_request, feed_forward=experts_of_json),
    to_gguf=partial(decoder.to_gguf, width_key=_WIDTH_KEY),
)
