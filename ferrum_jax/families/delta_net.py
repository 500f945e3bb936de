"""Shared by families that alternate layers with attention and layers with a gated delta net: keys, tensors, sizes.

In GGUF files norms have the 1 added that transformers adds to their weights, `ssm_a` is -exp(A_log), and families may have
their value heads in another order; a directory's tensors are changed in this way while they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_jax.config import Attention, GatedDeltaNet, LayerSpec, Mixture, ModelConfig
from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.keys import Keys, shown
from ferrum_jax.families.table import Change, Table, Tensor
from ferrum_jax.files.metadata import Typed

if TYPE_CHECKING:
    from ferrum_jax.files.tensor_info import TensorInfo

_INTERVAL = 4  # of layers that attend, for files that do not state it
_PATH = "delta_net"
Rows = Callable[[LayerSpec], np.ndarray]


def attends(spec: LayerSpec) -> bool:
    """Whether a layer has attention."""
    return isinstance(spec.mixer, Attention)


def mixer_of(spec: LayerSpec) -> GatedDeltaNet:
    """The gated delta net of a layer that has one."""
    assert isinstance(spec.mixer, GatedDeltaNet)
    return spec.mixer


def recurs(spec: LayerSpec) -> bool:
    """Whether a layer has a gated delta net."""
    return isinstance(spec.mixer, GatedDeltaNet)


# ---- tensors


def table(layer: tuple[Tensor, ...], root: str = "model.") -> Table:
    """The table of such a family: the tensors of its `layer`s and those that all have. root: the beginning of the names of
    modules."""
    norm = tensors.shifted_norm
    whole = (
        Tensor("token_embd.weight", ("embedding",), ("vocab", "hidden"), (f"{root}embed_tokens",)),
        norm("output_norm", ("final_norm",), "hidden", f"{root}norm"),
        tensors.EMBEDDINGS[-1],
    )
    block = (
        norm("attn_norm", ("attention_norm",), "hidden", "input_layernorm"),
        norm("post_attention_norm", ("feed_forward_norm",), "hidden", "post_attention_layernorm"),
    )
    return Table(whole, (*block, *_attention(), *layer), f"{root}layers.", tensors.IGNORED, r"(mtp|model\.visual)\..*")


def _attention() -> tuple[Tensor, ...]:
    matrices = []
    for row in tensors.attention()[1:5]:
        axes = ("gated_heads", "hidden") if row.stem == "attn_q" else row.axes
        matrices.append(dataclasses.replace(row, axes=axes, layers=attends))
    norms = (
        tensors.shifted_norm(f"attn_{x}_norm", ("attention", f"{name}_norm"), "head", f"self_attn.{x}_norm", layers=attends)
        for x, name in (("q", "query"), ("k", "key"))
    )
    return (*matrices, *norms)


def recurrent(stem: str, name: str, axes: tuple[str, ...], module: str | Change, **more: Any) -> Tensor:
    """A tensor of the gated delta net. stem: of its GGUF name, including the suffix if that is not ".weight"."""
    full = stem if stem == "ssm_a" or "." in stem else f"{stem}.weight"
    return Tensor(full, (_PATH, name), axes, (module,), recurs, **more)


def vectors(rows: Rows | None = None, channels: Rows | None = None) -> tuple[Tensor, ...]:
    """Taps, decay, bias and norm. rows, channels: as of `Change`, of those by value head and of those by channel."""

    def negative_exponential(values: np.ndarray) -> np.ndarray:
        return -np.exp(values)

    taps = Change("linear_attn.conv1d.weight", channels, values=np.copy)
    decay = Change("linear_attn.A_log", rows, values=negative_exponential)
    return (
        recurrent("ssm_conv1d", "taps", ("channels", "taps"), taps, quantize=False),
        recurrent("ssm_a", "decay", ("value_heads",), decay),
        recurrent("ssm_dt.bias", "time_bias", ("value_heads",), Change("linear_attn.dt_bias", rows, values=np.copy)),
        recurrent("ssm_norm", "norm", ("value_dim",), "linear_attn.norm"),
    )


def shared_expert() -> tuple[Tensor, ...]:
    """The expert of all tokens, and the vector that weights it."""
    row = Tensor(
        "ffn_gate_inp_shexp.weight",
        ("feed_forward", "shared_router"),
        ("hidden",),
        (Change("mlp.shared_expert_gate.weight"),),
        tensors.has_shared,
    )
    return row, *tensors.shared_expert("mlp.shared_expert")


def sizes(config: ModelConfig, spec: LayerSpec | None) -> dict[str, int | tuple[int, int]]:
    """Of the axes above and of `tensors`."""
    if spec is None:
        return {"vocab": config.vocab_size, "hidden": config.hidden_size}
    found = tensors.sizes(config, spec)
    if isinstance(attention := spec.mixer, Attention):
        return found | {"gated_heads": (attention.num_heads, 2 * attention.head_dim)}
    mixer = mixer_of(spec)
    return found | {
        "channels": mixer.channels,
        "taps": mixer.taps,
        "values": mixer.value_heads * mixer.value_dim,
        "value_heads": mixer.value_heads,
        "value_dim": mixer.value_dim,
        "beta_alpha": 2 * mixer.value_heads,
    }


# ---- keys


def from_gguf(
    family: Family,
    keys: Keys,
    found: Mapping[str, TensorInfo],
    *,
    tiled: bool,
    feed_forward: Callable[[Keys, int], decoder.Fields] | None = None,
) -> ModelConfig:
    """As `Family.from_gguf`; tiled: as of `GatedDeltaNet`, feed_forward: as of `decoder.from_gguf`."""
    config = decoder.from_gguf(family, keys, found, feed_forward=feed_forward)
    keys.ignore("rope.dimension_sections")  # of positions in pictures; those of a text are one number
    heads, inner = keys.integer("ssm.time_step_rank", high=2**16), keys.integer("ssm.inner_size")
    if inner % heads:
        raise keys.fail("ssm.inner_size", f"{inner} is not a multiple of ssm.time_step_rank {heads}")
    key_heads = keys.integer("ssm.group_count", high=heads)
    if heads % key_heads:
        raise keys.fail("ssm.group_count", f"{key_heads} does not divide ssm.time_step_rank {heads}")
    key_dim, taps = keys.integer("ssm.state_size", high=2**14), keys.integer("ssm.conv_kernel", low=2, high=64)
    mixer = GatedDeltaNet(key_heads, heads, key_dim, inner // heads, taps, tiled)
    interval = keys.integer("full_attention_interval") if keys.has("full_attention_interval") else _INTERVAL
    key = "attention.recurrent_layers"
    which = keys.get(key)
    if which is None:
        which = [bool((number + 1) % interval) for number in range(config.num_layers)]
    elif not isinstance(which, np.ndarray) or which.dtype.kind not in "biu" or len(which) != config.num_layers:
        raise keys.fail(key, f"must say true or false for each of the {config.num_layers} layers, not {shown(which)}")
    shared = 0
    if config.expert_layers and keys.has("expert_shared_feed_forward_length"):
        shared = keys.integer("expert_shared_feed_forward_length")
    return _config(config, mixer, which, shared)


def from_json(
    family: Family,
    keys: Keys,
    path: Path,
    *,
    tiled: bool,
    feed_forward: Callable[[Keys, int], decoder.Fields] | None = None,
) -> ConfigFile:
    """As `Family.from_json`; tiled: as of `GatedDeltaNet` once tensors are read, feed_forward: as of `decoder.from_json`."""
    kinds: list[bool] = []

    def windows(keys: Keys, layers: int) -> tuple[int, ...]:
        kinds.extend(_recurrent_of_json(keys, layers))
        return (0,) * layers

    if keys.boolean("attention_bias", False):
        raise keys.unsupported("attention_bias", "true is not supported in this model class")
    file = decoder.from_json(family, keys, path, head_dim=256, rotated=0.25, window=windows, feed_forward=feed_forward)

    def number(key: str, default: int, high: int = 2**16, low: int = 1) -> int:
        return keys.integer(key, low=low, high=high) if keys.has(key) else default

    key_heads, heads = number("linear_num_key_heads", 16), number("linear_num_value_heads", 32)
    if heads % key_heads:
        raise keys.fail("linear_num_value_heads", f"{heads} is not a multiple of linear_num_key_heads {key_heads}")
    key_dim, value_dim = number("linear_key_head_dim", 128), number("linear_value_head_dim", 128)
    taps = number("linear_conv_kernel_dim", 4, 64, 2)
    mixer = GatedDeltaNet(key_heads, heads, key_dim, value_dim, taps, tiled)
    assert isinstance(file.config, ModelConfig)
    shared = number("shared_expert_intermediate_size", 512, 2**31 - 1) if file.config.expert_layers else 0
    keys.ignore("shared_expert_intermediate_size")
    return dataclasses.replace(file, config=_config(file.config, mixer, kinds, shared))


def _recurrent_of_json(keys: Keys, layers: int) -> list[bool]:
    """Which layers recur: those that `layer_types` names, else all but every `full_attention_interval`-th."""
    keys.ignore("full_attention_interval")
    kinds = keys.get("layer_types")
    if kinds is None:
        interval = keys.integer("full_attention_interval") if keys.has("full_attention_interval") else _INTERVAL
        return [bool((number + 1) % interval) for number in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise keys.fail("layer_types", f"must be a list of {layers} kinds")
    if unknown := {str(kind) for kind in kinds} - {"linear_attention", "full_attention"}:
        raise keys.unsupported("layer_types", f"{sorted(unknown)} in this model class is not supported")
    return [kind == "linear_attention" for kind in kinds]


def _config(config: ModelConfig, mixer: GatedDeltaNet, recurrent: Any, shared: int) -> ModelConfig:
    """The configuration with gated attention, and with `mixer` in the layers that recur."""

    def layer(spec: LayerSpec, recurs: bool) -> LayerSpec:
        feed_forward, attention = spec.feed_forward, spec.mixer
        assert isinstance(attention, Attention)
        if isinstance(feed_forward, Mixture):
            feed_forward = dataclasses.replace(feed_forward, shared_width=shared)
        return LayerSpec(mixer if recurs else dataclasses.replace(attention, gated=True), feed_forward)

    return dataclasses.replace(config, layers=tuple(map(layer, config.layers, recurrent)))


def to_gguf(config: ModelConfig, where: str, **more: Any) -> dict[str, Typed]:
    """As `Family.to_gguf`; more: as of `decoder.to_gguf`."""
    typed = decoder.to_gguf(config, where, **more)
    mixer = next(spec.mixer for spec in config.layers if isinstance(spec.mixer, GatedDeltaNet))
    which = np.array([recurs(spec) for spec in config.layers])
    integers = {
        "ssm.conv_kernel": mixer.taps,
        "ssm.state_size": mixer.key_dim,
        "ssm.group_count": mixer.key_heads,
        "ssm.time_step_rank": mixer.value_heads,
        "ssm.inner_size": mixer.value_heads * mixer.value_dim,
    }
    if config.expert_layers:
        (integers["expert_shared_feed_forward_length"],) = {
            spec.feed_forward.shared_width for spec in config.layers if isinstance(spec.feed_forward, Mixture)
        }
    interval = int(which.argmin()) + 1  # what readers without the list go by
    if ((np.arange(1, len(which) + 1) % interval > 0) == which).all():
        integers["full_attention_interval"] = interval
    own = {key: Typed(value, "uint32") for key, value in integers.items()}
    own["attention.recurrent_layers"] = Typed(which, "array bool")
    return typed | {f"{config.architecture}.{key}": entry for key, entry in own.items()}


def tiled_heads(spec: LayerSpec, width: int) -> np.ndarray:
    """Which row in a directory each row in a GGUF file is, with `width` rows for each value head: files have the first value
    heads of all key heads, then the second ones."""
    mixer = mixer_of(spec)
    rows = np.arange(mixer.value_heads * width).reshape(mixer.key_heads, -1, width)
    return rows.transpose(1, 0, 2).reshape(-1)
