"""Mixtral (arXiv 2401.04088): Mistral with mixtures of experts; its GGUF files are of arch `llama`."""

import dataclasses
from functools import partial

from ferrum_jax.families import decoder
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.llama import LLAMA


def _experts(keys: Keys, layers: int) -> decoder.Fields:
    count = decoder.num_experts(keys, low=1)
    return {
        "num_experts": count,
        "experts_per_token": keys.integer("num_experts_per_tok", high=count),
        "expert_intermediate_size": keys.integer("intermediate_size"),
        "norm_topk_prob": True,
    }


MIXTRAL = dataclasses.replace(
    LLAMA,
    model_class="MixtralForCausalLM",
    model_type="mixtral",
    from_json=partial(decoder.from_json, theta=1e6, window=decoder.stated_window, feed_forward=_experts),
)
