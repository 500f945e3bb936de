"""An adapter from the tensors of PEFT's file, by the layout as PEFT's own code reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ferrum_jax.finetune import LoraAdapter

_MODULES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward.expert_gate_up": "mlp.experts.base_layer",
    "feed_forward.expert_down": "mlp.experts",
}


def filled(adapter: LoraAdapter, tensors: Mapping[str, np.ndarray]) -> LoraAdapter:
    """An adapter like this one, with the numbers of these tensors."""
    pairs = {}
    for path, sliced in adapter.pairs.items():
        ((label, (a, b)),) = sliced.groups.items()
        made = [_pair(tensors, _name(path, layer), a.shape[1:]) for layer, own in enumerate(sliced.labels) if own]
        new_a, new_b = (np.stack(arrays) for arrays in zip(*made, strict=True))
        assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
        pairs[path] = dataclasses.replace(sliced, groups={label: (jnp.asarray(new_a), jnp.asarray(new_b))})
    return dataclasses.replace(adapter, pairs=pairs)


def _name(path: str, layer: int) -> str:
    return f"base_model.model.model.layers.{layer}.{_MODULES[path]}.lora_"


def _pair(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    a, b = tensors[name + "A.weight"], tensors[name + "B.weight"]
    if len(shape) == 2:
        return a, b
    experts, rank, _ = shape
    return a.reshape(shape), b.reshape(-1, rank, experts).transpose(2, 0, 1)


def tensors_of(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """The opposite."""
    found = {}
    for path, sliced in adapter.pairs.items():
        ((label, (a, b)),) = sliced.groups.items()
        for item, layer in enumerate(layer for layer, own in enumerate(sliced.labels) if own == label):
            one, two = np.asarray(a[item]), np.asarray(b[item])
            if one.ndim == 3:
                one, two = one.reshape(-1, one.shape[-1]), two.transpose(1, 2, 0).reshape(two.shape[1], -1)
            found[_name(path, layer) + "A.weight"], found[_name(path, layer) + "B.weight"] = one, two
    return found
