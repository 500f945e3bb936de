"""Metadata with their GGUF types, so that a checkpoint can be written as a GGUF file again, key by key as it was.

Values alone do not say what they were (an `int` may be an uint32 or an int64), and llama.cpp refuses a key of another type
than it expects. A source of GGUF metadata knows the types; for any other, `of_config` writes the keys that say what
`config_from_gguf` reads.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import UnsupportedModelError

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float32", "float64")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (*INTEGERS, *FLOATS, "bool")}


class Typed(NamedTuple):
    """A value as `GGUFFile.metadata` has it and its type: INTEGERS, FLOATS, "bool", "string", or "array " and one of them."""

    value: object
    kind: str

    @property
    def element(self) -> str:
        """The type of an array's elements; "" of a scalar."""
        return self.kind.partition(" ")[2]


def plain(typed: Mapping[str, Typed]) -> dict[str, object]:
    return {key: entry.value for key, entry in typed.items()}


def to_json(typed: Mapping[str, Typed]) -> dict[str, list]:
    """{key: [type, value]}; floats in hexadecimal and arrays of numbers in base64, so that they come back bit by bit."""

    def value_of(entry: Typed):
        if isinstance(entry.value, np.ndarray):
            return base64.b64encode(entry.value.astype(_DTYPES[entry.element]).tobytes()).decode()
        return entry.value.hex() if isinstance(entry.value, float) else entry.value

    return {key: [entry.kind, value_of(entry)] for key, entry in typed.items()}


def from_json(entries: Mapping[str, list]) -> dict[str, Typed]:
    """The inverse. ValueError, TypeError or KeyError for what is damaged."""
    return {key: Typed(_from_json(kind, value), kind) for key, (kind, value) in entries.items()}


def _from_json(kind: str, value):
    if kind in FLOATS:
        return float.fromhex(value)
    if kind.startswith("array ") and kind != "array string":
        return np.frombuffer(base64.b64decode(value, validate=True), _DTYPES[kind.removeprefix("array ")]).copy()
    expected = {"array string": list, "string": str, "bool": bool} | dict.fromkeys(INTEGERS, int)
    if type(value) is not expected[kind] or (isinstance(value, list) and not set(map(type, value)) <= {str}):
        raise ValueError(f"{str(value)[:60]!r} is no {kind}")
    return value


def of_config(config: ModelConfig, where: str) -> dict[str, Typed]:
    """The keys of the architecture's namespace for a model whose checkpoint has none. UnsupportedModelError for what
    llama.cpp cannot be told."""
    if config.dense_layers:
        raise UnsupportedModelError(f"{where}: layers without experts among layers with them cannot be written as GGUF")
    if config.num_experts and not config.norm_topk_prob:
        raise UnsupportedModelError(f"{where}: norm_topk_prob false cannot be written as GGUF: llama.cpp renormalizes always")
    width = config.intermediate_size
    if config.architecture == "llama" and config.num_experts:
        width = config.expert_intermediate_size
    integers = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rope_dim,
        "vocab_size": config.vocab_size,
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.expert_intermediate_size if config.architecture != "llama" else 0,
    }
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta}
    if config.expert_weights_scale != 1.0:
        floats["expert_weights_scale"] = config.expert_weights_scale
    texts = {}
    if scaling := config.rope_scaling:
        texts["rope.scaling.type"] = scaling.kind
        floats["rope.scaling.factor"] = scaling.factor
        attention = scaling.attention_factor
        if scaling.kind == "yarn":
            integers["rope.scaling.original_context_length"] = scaling.original_context
            attention /= 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0
            floats["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
            floats["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
        if abs(attention - 1.0) > 1e-6:
            floats["rope.scaling.attn_factor"] = attention
    typed = {key: Typed(value, "uint32") for key, value in integers.items() if value}
    typed |= {key: Typed(value, "float32") for key, value in floats.items()}
    typed |= {key: Typed(value, "string") for key, value in texts.items()}
    return {f"{config.architecture}.{key}": entry for key, entry in typed.items()}
