"""What a model is, as one frozen value.

`ModelConfig` is hashable and goes into jit as a static argument. It is read from the metadata of a GGUF file (here) or
from a config.json (config_json.py) and never completed with another model's defaults: a key that is needed and missing
is an error that names it, and so is a key that asks for something the decoder does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

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
    "bfloat16", "float16" or "int8" (float32 that a product may quantize in blocks); norms, softmax, router, residual
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


# Keys of an architecture's namespace that are read for some models only, or that say nothing about the computation.
_OTHERWISE = (
    *("feed_forward_length", "attention.value_length", "expert_used_count", "expert_feed_forward_length"),
    *("expert_weights_norm", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("rope.scaling.finetuned", "tensor_data_layout", "pooling_type"),
)
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # may be one number a layer


class Range(NamedTuple):
    """What a number may be: finite, above `low` (or equal to it, where `closed`), at most `high`."""

    low: float = 0.0
    high: float = math.inf
    closed: bool = False


# Far beyond any published model, and short of where float32 turns to infinity or NaN.
POSITIVE, AT_LEAST_ZERO = Range(), Range(closed=True)
EPS = Range(1e-30, 0.1, closed=True)
THETA = Range(1.0, 1e12)
FACTOR = Range(0.1, 1e5, closed=True)
ATTENTION_FACTOR = Range(0.01, 100.0, closed=True)
TURNS = Range(0.0, 1e5)  # of a rotation within a context: YaRN's beta, LLaMA-3.1's frequency factors
SCALE = Range(0.0, 1e4, closed=True)


def refuse_encoder(where: object) -> UnsupportedModelError:
    """The error for an encoder where a model that generates is needed."""
    return UnsupportedModelError(f"{where}: is an embedding model (BERT), which makes no text and has no logits; use `embed`")


def require_experts(config: ModelConfig) -> None:
    """UnsupportedModelError for a model without experts."""
    if not config.expert_layers:
        raise UnsupportedModelError(f"architecture {config.architecture!r}: this model has no experts, so there is no routing")


class Keys:
    """Typed access to the keys of one file that begin with `prefix`; every error names the file and the key. A value None
    is no value. Which keys were asked for is known, so that the rest can be judged in one place (`refuse_unread`)."""

    def __init__(self, metadata: Mapping[str, object], prefix: str, source: str):
        self.metadata, self.prefix, self.source = metadata, prefix, source
        self.asked: set[str] = set()

    def fail(self, key: str, text: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: key {self.prefix + key}: {text}")

    def unsupported(self, key: str, text: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source}: key {self.prefix + key}: {text}")

    def get(self, key: str) -> Any:
        """The value as it stands in the file, or None."""
        self.asked.add(key)
        return self.metadata.get(self.prefix + key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def refuse_unread(self, text: str) -> None:
        """UnsupportedModelError for the first key that nothing asked for, unless its value says "none"."""
        for key, value in self.metadata.items():
            name = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and name not in self.asked and not is_neutral(value):
                raise self.unsupported(name, text.format(shown(value)))

    def integer(self, key: str, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, np.ndarray) and key in _PER_LAYER:  # one number a layer: the layers must agree
            values = value.tolist()
            if len(values) != self.integer("block_count"):
                raise self.fail(key, f"has {len(values)} values; it must have one for each of the layers")
            if len(set(values)) != 1:
                raise self.unsupported(key, "differs from layer to layer, which is not supported")
            value = values[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, not {shown(value)}")
        if not low <= value <= high:
            raise self.fail(key, f"is {shown(value)}; it must be from {low} to {high}")
        return value

    def number(self, key: str, within: Range = POSITIVE) -> float:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, not {shown(value)}")
        low, high, closed = within
        if not (abs(value) < 1e300 and (value >= low if closed else value > low) and value <= high):
            most = "" if high == math.inf else f" and at most {high:g}"
            raise self.fail(key, f"is {shown(value)}; it must be finite and {'at least' if closed else 'above'} {low}{most}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {shown(value)}")
        return value


def is_neutral(value: object) -> bool:
    """Whether a value says that something is not there: null, false, 0, empty, "none"."""
    if value is None or isinstance(value, bool | int | float | str):
        return value in (None, False, 0, "", "none")
    return isinstance(value, list | dict) and not value


def shown(value: object) -> str:
    """A value for an error: short, and on one line."""
    if isinstance(value, np.ndarray) or (isinstance(value, list) and len(value) > 8):
        return f"an array of {len(value)} values"
    text = f"an integer of {value.bit_length()} bits" if type(value) is int and abs(value) >= 1 << 64 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def config_architecture(metadata: Mapping[str, object], source: str) -> str:
    """What `general.architecture` of a GGUF file says."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{source}: key general.architecture: is missing or not a string")
    return architecture


def config_from_gguf(gguf) -> ModelConfig:
    """The configuration of an open `GGUFFile` (metadata and the shape of its embedding); no tensor data is read.

    Raises `UnsupportedModelError` for an architecture or feature that is not implemented, `ModelFileError` for a
    missing or impossible key.
    """
    source = str(gguf.path)
    architecture = config_architecture(gguf.metadata, source)
    if architecture == "bert":
        raise refuse_encoder(source)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    meta = Keys(gguf.metadata, architecture + ".", source)
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
    _refuse_unsupported(meta)
    config = ModelConfig(
        architecture=architecture,
        num_layers=meta.integer("block_count", high=4096),
        hidden_size=hidden,
        intermediate_size=0 if experts else meta.integer("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=meta.integer("context_length"),
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon", EPS),
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
    meta.asked.update(_OTHERWISE)
    meta.refuse_unread("this feature is not supported")
    return config


def _refuse_unsupported(meta: Keys) -> None:
    if meta.has("expert_gating_func") and meta.integer("expert_gating_func", low=0) > 1:  # 0: not stated, 1: softmax
        raise meta.unsupported("expert_gating_func", "only softmax (1) is supported")
    if meta.has("attention.causal") and not meta.boolean("attention.causal"):
        raise meta.unsupported("attention.causal", "this feature is not supported")
    for key in ("residual_scale", "embedding_scale", "logit_scale"):
        if meta.has(key) and meta.number(key, SCALE) not in (0.0, 1.0):
            raise meta.unsupported(key, "this feature is not supported")


def _head_dim(meta: Keys, hidden: int, heads: int) -> int:
    """The file's key_length; without the key the format defines it as hidden / heads."""
    if not meta.has("attention.key_length"):
        if hidden % heads:
            raise meta.fail("attention.key_length", f"is missing and {hidden} is no multiple of {heads} heads")
        return hidden // heads
    head_dim = meta.integer("attention.key_length", high=2**14)
    value_dim = meta.integer("attention.value_length") if meta.has("attention.value_length") else head_dim
    if value_dim != head_dim:
        text = f"{value_dim} differs from key_length {head_dim}, which is not supported"
        raise meta.unsupported("attention.value_length", text)
    return head_dim


def _rope_theta(meta: Keys, architecture: str) -> float:
    """Arch `llama` files of before the key existed mean 10,000; every other architecture states it."""
    if architecture == "llama" and not meta.has("rope.freq_base"):
        return 10_000.0
    return meta.number("rope.freq_base", THETA)


def _norm_topk(meta: Keys, architecture: str) -> bool:
    """Qwen3-MoE and Mixtral GGUF files are run with renormalized weights whether or not they carry the key."""
    if meta.has("expert_weights_norm") and not meta.boolean("expert_weights_norm"):
        raise meta.unsupported("expert_weights_norm", f"false contradicts how {architecture} files are run")
    return True


def _expert_scale(meta: Keys) -> float:
    """0 is written by converters for "none"."""
    scale = meta.number("expert_weights_scale", SCALE) if meta.has("expert_weights_scale") else 0.0
    return scale or 1.0


def _rope_scaling(meta: Keys) -> RopeScaling | None:
    """Without a type a factor means linear scaling, as the format has it; type "none" means none."""
    kind = meta.get("rope.scaling.type") if meta.has("rope.scaling.type") else "linear"
    if not isinstance(kind, str):
        raise meta.fail("rope.scaling.type", f"must be a string, not {shown(kind)}")
    if kind not in ("none", "linear", "yarn"):
        raise meta.unsupported("rope.scaling.type", f"{kind!r:.100} is not supported")
    attention = 1.0
    if meta.has("rope.scaling.attn_factor"):
        attention = meta.number("rope.scaling.attn_factor", ATTENTION_FACTOR)
    if kind == "none":
        if attention != 1.0:
            raise meta.unsupported("rope.scaling.attn_factor", "needs a scaling type")
        return None
    key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if meta.has(key)), "rope.scaling.factor")
    if kind == "linear":
        factor = meta.number(key, AT_LEAST_ZERO) if meta.has(key) else 0.0  # 0 is written for "none"
        factor = meta.number(key, FACTOR) if factor else 0.0
        if not factor and meta.has("rope.scaling.type"):
            raise meta.fail("rope.scaling.factor", "is missing")
        return RopeScaling("linear", factor or 1.0, attention_factor=attention) if factor or attention != 1.0 else None

    factor = meta.number("rope.scaling.factor", FACTOR)
    if meta.has("rope.scaling.yarn_log_multiplier") and meta.number("rope.scaling.yarn_log_multiplier", AT_LEAST_ZERO):
        raise meta.unsupported("rope.scaling.yarn_log_multiplier", "not supported")
    fast, slow = yarn_turns(meta, "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
    return RopeScaling(
        "yarn",
        factor,
        original_context=meta.integer("rope.scaling.original_context_length"),
        attention_factor=attention * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0),
        beta_fast=fast,
        beta_slow=slow,
    )


def yarn_turns(keys: Keys, fast_key: str, slow_key: str) -> tuple[float, float]:
    """YaRN's beta_fast and beta_slow; its own constants (section 3.2 of the paper) where the file does not override them."""
    fast = keys.number(fast_key, TURNS) if keys.has(fast_key) else 32.0
    slow = keys.number(slow_key, TURNS) if keys.has(slow_key) else 1.0
    if fast < slow:
        raise keys.fail(fast_key, f"is {fast}; it must be at least {slow_key}, {slow}")
    return fast, slow
