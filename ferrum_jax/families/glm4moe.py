"""GLM-4.5, 4.6 and 4.7 with experts (arXiv 2508.06471): the first layers are dense, routers have sigmoids, half of each
head is rotated, and some of the models normalize queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ferrum_jax.config import ModelConfig
from ferrum_jax.families import decoder, grouped, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.keys import Keys
from ferrum_jax.files.tensor_info import TensorInfo

_DEFAULTS = {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
_ATTENTION = tuple(tensor for tensor in tensors.attention() if tensor.name != "attn_output.bias")
_HEAD_NORMS = tuple(dataclasses.replace(tensor, optional=True) for tensor in tensors.HEAD_NORMS)


def _from_gguf(family: Family, keys: Keys, found: Mapping[str, TensorInfo]) -> ModelConfig:
    keys.ignore("rope.dimension_sections")  # of positions in pictures; those of a text are one number
    return decoder.from_gguf(family, keys, found, feed_forward=partial(grouped.from_gguf, scoring="sigmoid"))


def _from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    file = decoder.from_json(family, keys, path, rotated=0.5, feed_forward=partial(grouped.from_json, defaults=_DEFAULTS))
    normed = keys.boolean("use_qk_norm", False)
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    predicting = [keys.integer(name, low=0, high=64) for name in names if keys.has(name)]
    return dataclasses.replace(
        file,
        optional={tensor.name: normed for tensor in _HEAD_NORMS},
        predicting=max(predicting, default=1),
    )


GLM4_MOE = Family(
    architecture="glm4moe",
    model_class="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    tensors=tensors.decoder((*_ATTENTION, *_HEAD_NORMS, tensors.POST_ATTENTION_NORM, *grouped.feed_forward(biased=True))),
    sizes=tensors.sizes,
    from_gguf=_from_gguf,
    from_json=_from_json,
    to_gguf=partial(decoder.to_gguf, feed_forward=grouped.to_gguf),
    predicts=True,
)
