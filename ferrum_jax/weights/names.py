"""One table: which tensor of a checkpoint is which parameter, what shape it has, and which families need it.

`parameters(source, config)` holds a checkpoint against the table. What comes back names every tensor exactly once;
anything missing, unknown or of the wrong shape is an error, raised before a byte of weights is read.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from ferrum_jax.config import Dense, Mixture, ModelConfig
from ferrum_jax.encoder_config import EncoderConfig
from ferrum_jax.errors import ModelFileError
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.tensor_info import TensorInfo

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter: its path, the names of its dimensions (see `_sizes`) and the families that must or may have it."""

    path: Path
    shape: tuple[str, ...]
    required: str = "all"  # "all", "dense" or "experts" (by layer), an architecture, or "" (optional)
    allowed: tuple[str, ...] = ()  # architectures that may have an optional one; () for all


_BIASED = ("llama", "qwen2", "qwen3", "qwen3moe")
GLOBAL = {
    "token_embd.weight": Entry(("embedding",), ("vocab", "hidden")),
    "output_norm.weight": Entry(("final_norm",), ("hidden",)),
    "output.weight": Entry(("unembedding",), ("vocab", "hidden"), ""),
    "rope_freqs.weight": Entry(("rope_factors",), ("rotated",), "", ("llama",)),
}
LAYER = {
    "attn_norm.weight": Entry(("attention_norm",), ("hidden",)),
    "attn_q.weight": Entry(("attention", "query"), ("queries", "hidden")),
    "attn_k.weight": Entry(("attention", "key"), ("keys", "hidden")),
    "attn_v.weight": Entry(("attention", "value"), ("keys", "hidden")),
    "attn_output.weight": Entry(("attention", "output"), ("hidden", "queries")),
    "attn_q.bias": Entry(("attention", "query_bias"), ("queries",), "qwen2", _BIASED),
    "attn_k.bias": Entry(("attention", "key_bias"), ("keys",), "qwen2", _BIASED),
    "attn_v.bias": Entry(("attention", "value_bias"), ("keys",), "qwen2", _BIASED),
    "attn_output.bias": Entry(("attention", "output_bias"), ("hidden",), "", _BIASED),
    "attn_q_norm.weight": Entry(("attention", "query_norm"), ("head_dim",), "qwen3", ("qwen3", "qwen3moe")),
    "attn_k_norm.weight": Entry(("attention", "key_norm"), ("head_dim",), "qwen3", ("qwen3", "qwen3moe")),
    "ffn_norm.weight": Entry(("feed_forward_norm",), ("hidden",)),
    "ffn_gate.weight": Entry(("feed_forward", "gate"), ("width", "hidden"), "dense"),
    "ffn_up.weight": Entry(("feed_forward", "up"), ("width", "hidden"), "dense"),
    "ffn_down.weight": Entry(("feed_forward", "down"), ("hidden", "width"), "dense"),
    "ffn_gate.bias": Entry(("feed_forward", "gate_bias"), ("width",), "", ("llama",)),
    "ffn_up.bias": Entry(("feed_forward", "up_bias"), ("width",), "", ("llama",)),
    "ffn_down.bias": Entry(("feed_forward", "down_bias"), ("hidden",), "", ("llama",)),
    "ffn_gate_inp.weight": Entry(("feed_forward", "router"), ("experts", "hidden"), "experts"),
    "ffn_gate_exps.weight": Entry(("feed_forward", "expert_gate"), ("experts", "expert_width", "hidden"), "experts"),
    "ffn_up_exps.weight": Entry(("feed_forward", "expert_up"), ("experts", "expert_width", "hidden"), "experts"),
    "ffn_down_exps.weight": Entry(("feed_forward", "expert_down"), ("experts", "hidden", "expert_width"), "experts"),
}
ENCODER_GLOBAL = {
    "token_embd.weight": Entry(("embedding",), ("vocab", "hidden")),
    "position_embd.weight": Entry(("positions",), ("context", "hidden")),
    "token_types.weight": Entry(("types",), ("types", "hidden")),
    "token_embd_norm.weight": Entry(("embedding_norm",), ("hidden",)),
    "token_embd_norm.bias": Entry(("embedding_norm_bias",), ("hidden",)),
}
ENCODER_LAYER = {
    **{
        f"attn_{letter}.{part}": Entry(("attention", name + suffix), shape)
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("output", "output"))
        for part, suffix, shape in (("weight", "", ("hidden", "hidden")), ("bias", "_bias", ("hidden",)))
    },
    "attn_output_norm.weight": Entry(("attention_norm",), ("hidden",)),
    "attn_output_norm.bias": Entry(("attention_norm_bias",), ("hidden",)),
    "ffn_up.weight": Entry(("feed_forward", "up"), ("width", "hidden")),
    "ffn_up.bias": Entry(("feed_forward", "up_bias"), ("width",)),
    "ffn_down.weight": Entry(("feed_forward", "down"), ("hidden", "width")),
    "ffn_down.bias": Entry(("feed_forward", "down_bias"), ("hidden",)),
    "layer_output_norm.weight": Entry(("feed_forward_norm",), ("hidden",)),
    "layer_output_norm.bias": Entry(("feed_forward_norm_bias",), ("hidden",)),
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The tensors of a checkpoint by parameter path: one each for `whole`, one per layer (or None) for `stacked`."""

    whole: dict[Path, TensorInfo]
    stacked: dict[Path, tuple[TensorInfo | None, ...]]

    @property
    def layer_formats(self) -> list[tuple[str, ...]]:
        """The kinds of each layer's parameters: layers of equal kinds share a compiled body."""
        return list(zip(*([kind_of(t) if t else "" for t in tensors] for tensors in self.stacked.values()), strict=True))


def kept_format(tensor: TensorInfo) -> str:
    """The format a tensor has on the device: its own, but norms and biases become float32."""
    return "F32" if len(tensor.shape) == 1 else tensor.format


def kind_of(tensor: TensorInfo) -> str:
    """What tensors of one stack have in common: the format kept, and whether their columns lie in another order."""
    return kept_format(tensor) + ("+order" if tensor.order else "")


def parameters(source: ModelSource, config: ModelConfig | EncoderConfig) -> Parameters:
    """Every tensor of the checkpoint in its place. Raises `ModelFileError` naming the tensor that is missing, unknown or
    misshapen."""
    sizes = functools.cache(functools.partial(_sizes, config))
    of_model, of_layer = (ENCODER_GLOBAL, ENCODER_LAYER) if isinstance(config, EncoderConfig) else (GLOBAL, LAYER)
    whole: dict[Path, TensorInfo] = {}
    layers: dict[Path, list[TensorInfo | None]] = {}
    for name, tensor in source.tensors.items():
        match = _LAYER_NAME.fullmatch(name)
        layer = int(match[1]) if match else None
        entry = of_layer.get(match[2]) if match else of_model.get(name)
        if layer is not None and layer >= config.num_layers:
            raise ModelFileError(f"{source.path}: tensor {tensor.name}: the model has only {config.num_layers} layers")
        if entry is None or not _wanted(entry, config, layer):
            raise ModelFileError(
                f"{source.path}: tensor {tensor.name}: is unknown in a model of architecture {config.architecture}"
            )
        expected = tuple(sizes(layer)[dimension] for dimension in entry.shape)
        if tensor.shape != expected:
            raise ModelFileError(
                f"{source.path}: tensor {tensor.name}: shape {list(tensor.shape)}; expected {list(expected)} "
                f"({', '.join(entry.shape)}) by the model's configuration"
            )
        if layer is None:
            whole[entry.path] = tensor
        else:
            layers.setdefault(entry.path, [None] * config.num_layers)[layer] = tensor

    for name, entry in of_model.items():
        if _required(entry, config) and entry.path not in whole:
            raise ModelFileError(f"{source.path}: tensor {source.own_name(name)}: is missing")
    for name, entry in of_layer.items():
        found = layers.get(entry.path)
        for number in range(config.num_layers):
            needed = _required(entry, config, number) or (found is not None and _wanted(entry, config, number))
            if needed and (found is None or found[number] is None):
                raise ModelFileError(f"{source.path}: tensor {source.own_name(f'blk.{number}.{name}')}: is missing")
    return Parameters(whole, {path: tuple(tensors) for path, tensors in layers.items()})


def matrix_shape(path: Path, config: ModelConfig, layer: int) -> tuple[int, ...]:
    """The shape of a layer's parameter."""
    entry = next(entry for entry in LAYER.values() if entry.path == path)
    sizes = _sizes(config, layer)
    return tuple(sizes[dimension] for dimension in entry.shape)


def _sizes(config: ModelConfig | EncoderConfig, layer: int | None) -> dict[str, int]:
    """The dimensions of tensors of one layer, or of those that are one for the model."""
    sizes = {"vocab": config.vocab_size, "hidden": config.hidden_size}
    if isinstance(config, EncoderConfig):
        return sizes | {"width": config.intermediate_size, "context": config.context_length, "types": config.num_types}
    if layer is None:
        return sizes | {"rotated": max(spec.mixer.rope.dim for spec in config.layers) // 2}
    spec = config.layers[layer]
    attention, feed_forward = spec.mixer, spec.feed_forward
    sizes |= {"queries": attention.num_heads * attention.head_dim, "keys": attention.num_kv_heads * attention.head_dim}
    sizes |= {"head_dim": attention.head_dim}
    if isinstance(feed_forward, Mixture):
        return sizes | {"experts": feed_forward.num_experts, "expert_width": feed_forward.width, "width": 0}
    return sizes | {"width": feed_forward.width}


def _required(entry: Entry, config: ModelConfig | EncoderConfig, layer: int | None = None) -> bool:
    if isinstance(config, EncoderConfig):
        return True
    kind = "dense" if layer is None or isinstance(config.layers[layer].feed_forward, Dense) else "experts"
    return entry.required in ("all", kind, config.architecture) or (
        entry.required == "qwen3" and config.architecture == "qwen3moe"
    )


def _wanted(entry: Entry, config: ModelConfig | EncoderConfig, layer: int | None = None) -> bool:
    if entry.allowed:
        return config.architecture in entry.allowed
    return entry.required in ("all", "") or _required(entry, config, layer)
