"""What a model is, as one frozen value.

`ModelConfig` is hashable and goes into jit as a static argument. It is read from the metadata of a GGUF file (here) or
from a config.json (config_json.py) and never completed with another model's defaults: a key that is needed and missing
is an error that names it, and so is a key that asks for something the decoder does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ferrum_jax.errors import ModelFileError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is "linear" or "yarn" (arXiv 2309.00071)."""

    kind: str
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0  # multiplies cos and sin, the logarithmic term of YaRN included
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder.

    `rope_dim` of each head's `head_dim` values are rotated, in the half-split layout. `sliding_window` is the number of
    positions a query sees, itself included (0: all). `dense_layers` are those of a model of experts that have a dense
    feed-forward instead. `dtype` is the arithmetic of matrix products: "float32",
    "bfloat16", "float16" or "int8" (float32 that a product may quantise in blocks); norms, softmax, router, residual
    stream and logits are float32 always.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int  # of the dense feed-forward; 0 where every layer is a mixture
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    expert_weights_scale: float = 1.0
    dense_layers: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def activations(self) -> str:
        """The dtype in which activations reach matrix products."""
        return "float32" if self.dtype == "int8" else self.dtype

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are a mixture of experts."""
        return tuple(layer for layer in range(self.num_layers) if self.num_experts and layer not in self.dense_layers)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From what `dataclasses.asdict` gave, be it by way of JSON."""
        known = dict(fields)
        if known.get("rope_scaling") is not None:
            known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
        known["dense_layers"] = tuple(known.get("dense_layers", ()))
        return cls(**known)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in all layers, with elements of `itemsize` bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


# Keys of the architecture's namespace that describe something else than the computation, or that are read elsewhere.
_HARMLESS = {
    "vocab_size", "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "attention.sliding_window", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "expert_weights_norm", "expert_weights_scale", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned", "rope.scale_linear", "expert_gating_func", "tensor_data_layout", "pooling_type",
}  # fmt: skip
NEUTRAL: tuple[object, ...] = (0, 0.0, False, "", "none")


def refuse_encoder(where: object) -> UnsupportedModelError:
    """The error for an encoder where a model that generates is needed."""
    return UnsupportedModelError(f"{where}: is an embedding model (BERT), which makes no text and has no logits; use `embed`")


def require_experts(config: ModelConfig) -> None:
    """UnsupportedModelError for a model without experts."""
    if not config.expert_layers:
        raise UnsupportedModelError(f"architecture {config.architecture!r}: this model has no experts, so there is no routing")


class Keys:
    """Typed access to the keys of one file that begin with `prefix`; every error names the file and the key. A value None
    is no value."""

    def __init__(self, metadata: Mapping[str, object], prefix: str, source: str):
        self.metadata, self.prefix, self.source = metadata, prefix, source

    def fail(self, key: str, text: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: key {self.prefix + key}: {text}")

    def has(self, key: str) -> bool:
        return self.metadata.get(self.prefix + key) is not None

    def integer(self, key: str, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.metadata.get(self.prefix + key)
        if value is None:
            raise self.fail(key, "is missing")
        if hasattr(value, "tolist"):  # one number a layer: the layers must agree
            values = value.tolist()
            if len(values) != self.metadata.get(self.prefix + "block_count"):
                raise self.fail(key, f"has {len(values)} values; it must have one for each of the layers")
            if len(set(values)) != 1:
                raise UnsupportedModelError(
                    f"{self.source}: key {self.prefix + key}: differs from layer to layer, which is not supported"
                )
            value = values[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, not {value!r}")
        if not low <= value <= high:
            raise self.fail(key, f"is {value}; it must be from {low} to {high}")
        return value

    def number(self, key: str, *, low: float = 0.0, positive: bool = True) -> float:
        value = self.metadata.get(self.prefix + key)
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, not {value!r}")
        if not (math.isfinite(value) and (value > low if positive else value >= low)):
            raise self.fail(key, f"is {value}; it must be finite and {'above' if positive else 'at least'} {low}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.metadata[self.prefix + key]
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value


def config_from_gguf(gguf) -> ModelConfig:
    """The configuration of an open `GGUFFile` (metadata and the shape of its embedding); no tensor data is read.

    Raises `UnsupportedModelError` for an architecture or feature that is not implemented, `ModelFileError` for a
    missing or impossible key.
    """
    source = str(gguf.path)
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{source}: key general.architecture: is missing or not a string")
    if architecture == "bert":
        raise refuse_encoder(source)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    meta = Keys(gguf.metadata, architecture + ".", source)
    _refuse_unsupported(meta)

    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{source}: tensor token_embd.weight: is missing")
    hidden = meta.integer("embedding_length")
    if meta.has("vocab_size"):
        meta.integer("vocab_size")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise ModelFileError(
            f"{source}: tensor token_embd.weight: shape {list(embedding.shape)} does not end in "
            f"{architecture}.embedding_length = {hidden}"
        )
    heads = meta.integer("attention.head_count", high=2**16)
    kv_heads = meta.integer("attention.head_count_kv", high=2**16) if meta.has("attention.head_count_kv") else heads
    if heads % kv_heads:
        raise meta.fail("attention.head_count_kv", f"{kv_heads} does not divide attention.head_count {heads}")
    head_dim = _head_dim(meta, hidden, heads)
    rope_dim = meta.integer("rope.dimension_count", high=head_dim) if meta.has("rope.dimension_count") else head_dim
    if rope_dim % 2:
        raise meta.fail("rope.dimension_count", f"is {rope_dim}; it must be even")

    experts = meta.integer("expert_count", low=0, high=2**16) if meta.has("expert_count") else 0
    if architecture == "qwen3moe" and not experts:
        raise meta.fail("expert_count", "is missing or zero in a mixture-of-experts model")
    used = expert_width = 0
    if experts:
        used = meta.integer("expert_used_count", high=experts)
        key = "expert_feed_forward_length" if architecture == "qwen3moe" else "feed_forward_length"
        expert_width = meta.integer(key)
    return ModelConfig(
        architecture=architecture,
        num_layers=meta.integer("block_count", high=4096),
        hidden_size=hidden,
        intermediate_size=0 if experts else meta.integer("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=meta.integer("context_length"),
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon", positive=False),
        rope_theta=_rope_theta(meta, architecture),
        rope_dim=rope_dim,
        rope_scaling=_rope_scaling(meta),
        sliding_window=meta.integer("attention.sliding_window", low=0) if meta.has("attention.sliding_window") else 0,
        num_experts=experts,
        experts_per_token=used,
        expert_intermediate_size=expert_width,
        norm_topk_prob=bool(experts) and _norm_topk(meta, architecture),
        expert_weights_scale=_expert_scale(meta),
    )


def _refuse_unsupported(meta: Keys) -> None:
    gating = meta.integer("expert_gating_func", low=0) if meta.has("expert_gating_func") else 0
    if gating > 1:  # 0: not stated, 1: softmax
        raise UnsupportedModelError(f"{meta.source}: key {meta.prefix}expert_gating_func: only softmax (1) is supported")
    for key, value in meta.metadata.items():
        name = key.removeprefix(meta.prefix)
        if name == key or name in _HARMLESS:
            continue
        if name == "attention.causal":
            neutral = value is True
        elif name in ("residual_scale", "embedding_scale", "logit_scale"):
            neutral = isinstance(value, int | float) and value in (0.0, 1.0)
        else:
            neutral = isinstance(value, int | float | str) and value in NEUTRAL
        if not neutral:
            raise UnsupportedModelError(f"{meta.source}: key {key}: this feature is not supported")


def _head_dim(meta: Keys, hidden: int, heads: int) -> int:
    """The file's key_length; without the key the format defines it as hidden / heads."""
    if not meta.has("attention.key_length"):
        if hidden % heads:
            raise meta.fail("attention.key_length", f"is missing and {hidden} is no multiple of {heads} heads")
        return hidden // heads
    head_dim = meta.integer("attention.key_length", high=2**14)
    value_dim = meta.integer("attention.value_length") if meta.has("attention.value_length") else head_dim
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{meta.source}: key {meta.prefix}attention.value_length: {value_dim} differs from key_length {head_dim}, "
            "which is not supported"
        )
    return head_dim


def _rope_theta(meta: Keys, architecture: str) -> float:
    """Arch `llama` files of before the key existed mean 10,000; every other architecture states it."""
    if architecture == "llama" and not meta.has("rope.freq_base"):
        return 10_000.0
    return meta.number("rope.freq_base", low=1.0)


def _norm_topk(meta: Keys, architecture: str) -> bool:
    """Qwen3-MoE and Mixtral GGUF files are run with renormalised weights whether or not they carry the key."""
    if meta.has("expert_weights_norm") and not meta.boolean("expert_weights_norm"):
        raise UnsupportedModelError(
            f"{meta.source}: key {meta.prefix}expert_weights_norm: false contradicts how {architecture} files are run"
        )
    return True


def _expert_scale(meta: Keys) -> float:
    """0 is written by converters for "none"."""
    scale = meta.number("expert_weights_scale", positive=False) if meta.has("expert_weights_scale") else 0.0
    return scale or 1.0


def _rope_scaling(meta: Keys) -> RopeScaling | None:
    """Without a type a factor means linear scaling, as the format has it; type "none" means none."""
    kind = meta.metadata.get(meta.prefix + "rope.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{meta.source}: key {meta.prefix}rope.scaling.type: {kind!r} is not supported")
    attention = meta.number("rope.scaling.attn_factor") if meta.has("rope.scaling.attn_factor") else 1.0
    if kind == "none":
        if attention != 1.0:
            raise UnsupportedModelError(f"{meta.source}: key {meta.prefix}rope.scaling.attn_factor: needs a scaling type")
        return None
    if kind == "linear":
        key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if meta.has(key)), None)
        factor = meta.number(key, positive=False) if key else 0.0
        if not factor and meta.has("rope.scaling.type"):
            raise meta.fail("rope.scaling.factor", "is missing")
        return RopeScaling("linear", factor or 1.0, attention_factor=attention) if factor or attention != 1.0 else None

    factor = meta.number("rope.scaling.factor")
    if meta.has("rope.scaling.yarn_log_multiplier") and meta.number("rope.scaling.yarn_log_multiplier", positive=False):
        raise UnsupportedModelError(f"{meta.source}: key {meta.prefix}rope.scaling.yarn_log_multiplier: not supported")

    def beta(key: str, default: float) -> float:
        """YaRN's own constants (section 3.2 of the paper) where the file does not override them."""
        return meta.number(key) if meta.has(key) else default

    return RopeScaling(
        "yarn",
        factor,
        original_context=meta.integer("rope.scaling.original_context_length"),
        attention_factor=attention * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0),
        beta_fast=beta("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=beta("rope.scaling.yarn_beta_slow", 1.0),
    )
