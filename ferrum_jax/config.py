"""What a model is, as one frozen value.

`ModelConfig` is hashable and goes into jit as a static argument. It is read from the metadata of a GGUF file (here) or
from a config.json (config_json.py) and never completed with another model's defaults: a key that is needed and missing
is an error that names it, and so is a key that asks for something the decoder does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
MOST_LAYERS = 4096


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
class Rope:
    """The rotation of positions: the first `dim` of a head's values are rotated, in the half-split layout."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """A mixer: grouped-query attention. `window` is the number of positions a query sees, itself included (0: all)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    window: int = 0


@dataclasses.dataclass(frozen=True)
class Dense:
    """A feed-forward: one SwiGLU of this width."""

    width: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A feed-forward: each token goes through `experts_per_token` of `num_experts` SwiGLUs of this width. Their weights are
    normalized to a sum of 1 if `normalize`, then multiplied by `scale`."""

    num_experts: int
    experts_per_token: int
    width: int
    normalize: bool = False
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer is. Layers with equal specs and formats share a compiled body."""

    mixer: Attention
    feed_forward: Dense | Mixture


# Numbers of layers under the names that they have as keywords and properties of a ModelConfig: the part that has the number,
# its field, and the value where no layer has such a part.
_OF_LAYERS: dict[str, tuple[type, str, Any]] = {
    "num_heads": (Attention, "num_heads", 0),
    "num_kv_heads": (Attention, "num_kv_heads", 0),
    "head_dim": (Attention, "head_dim", 0),
    "sliding_window": (Attention, "window", 0),
    "rope_theta": (Rope, "theta", 0.0),
    "rope_dim": (Rope, "dim", 0),
    "rope_scaling": (Rope, "scaling", None),
    "intermediate_size": (Dense, "width", 0),
    "num_experts": (Mixture, "num_experts", 0),
    "experts_per_token": (Mixture, "experts_per_token", 0),
    "expert_intermediate_size": (Mixture, "width", 0),
    "norm_topk_prob": (Mixture, "normalize", False),
    "expert_weights_scale": (Mixture, "scale", 1.0),
}


def _common(name: str) -> Any:
    """A property: the number that all layers have that have it at all."""
    kind, field, _ = _OF_LAYERS[name]

    def common(config: ModelConfig) -> Any:
        found = config.by_layer(name)
        if isinstance(found, tuple):
            raise ValueError(
                f"{name} differs from layer to layer: by_layer({name!r}) has one value for each, config.layers all"
            )
        return found

    return property(common, doc=f"`{kind.__name__}.{field}` of the layers; ValueError where they differ.")


@dataclasses.dataclass(frozen=True, init=False)
class ModelConfig:
    """What is one for the whole decoder, and its layers.

    `dtype` is the arithmetic of matrix products: "float32", "bfloat16", "float16" or "int8" (float32 that a product may
    quantize in blocks); norms, softmax, router, residual stream and logits are float32 always.

    A model whose layers are alike is made of keywords instead of `layers`: num_layers, num_heads, num_kv_heads, head_dim,
    rope_theta, rope_dim, rope_scaling, sliding_window, intermediate_size (of a dense feed-forward), num_experts,
    experts_per_token, expert_intermediate_size, norm_topk_prob, expert_weights_scale, dense_layers (those without experts).
    They are properties too, and next to `layers`, as in `dataclasses.replace(config, experts_per_token=2)`, they change
    every layer that has such a number.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    layers: tuple[LayerSpec, ...]
    dtype: str

    def __init__(
        self,
        *,
        architecture: str,
        hidden_size: int,
        vocab_size: int,
        context_length: int,
        rms_norm_eps: float,
        layers: Iterable[LayerSpec] | None = None,
        dtype: str = "float32",
        **of_layers: Any,
    ):
        values = {
            "architecture": architecture,
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "rms_norm_eps": rms_norm_eps,
            "layers": _alike(**of_layers) if layers is None else tuple(layers),
            "dtype": dtype,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not self.layers:
            raise ValueError("layers is empty")
        if layers is not None and of_layers:
            object.__setattr__(self, "layers", _changed(self, of_layers))

    def __hash__(self) -> int:  # of few parts: jit asks for it at every call
        return hash((self.architecture, self.hidden_size, self.vocab_size, self.dtype, len(self.layers), self.layers[0]))

    num_heads = _common("num_heads")
    num_kv_heads = _common("num_kv_heads")
    head_dim = _common("head_dim")
    sliding_window = _common("sliding_window")
    rope_theta = _common("rope_theta")
    rope_dim = _common("rope_dim")
    rope_scaling = _common("rope_scaling")
    intermediate_size = _common("intermediate_size")
    num_experts = _common("num_experts")
    experts_per_token = _common("experts_per_token")
    expert_intermediate_size = _common("expert_intermediate_size")
    norm_topk_prob = _common("norm_topk_prob")
    expert_weights_scale = _common("expert_weights_scale")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def activations(self) -> str:
        """The dtype in which activations reach matrix products."""
        return "float32" if self.dtype == "int8" else self.dtype

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are a mixture of experts."""
        return tuple(number for number, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Mixture))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The numbers of the dense layers of a model that has mixtures."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.expert_layers))) if self.expert_layers else ()

    def by_layer(self, name: str) -> Any:
        """A number of layers, by the name of its property: one value where all layers agree that have it, else a tuple of
        one for each layer, None for a layer that does not have it."""
        kind, field, absent = _OF_LAYERS[name]
        values = {layer: [getattr(part, field) for part in parts(layer) if type(part) is kind] for layer in set(self.layers)}
        found = {value for of_layer in values.values() for value in of_layer}
        if len(found) > 1:
            return tuple(values[layer][0] if values[layer] else None for layer in self.layers)
        return found.pop() if found else absent

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From what `dataclasses.asdict` gave, be it by way of JSON, of this version or of one before there were layers."""
        known = dict(fields)
        if "layers" in known:
            known["layers"] = [_decoded((LayerSpec,), layer) for layer in known["layers"]]
        elif known.get("rope_scaling") is not None:
            known["rope_scaling"] = _decoded((RopeScaling,), known["rope_scaling"])
        return cls(**known)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in all layers, with elements of `itemsize` bytes."""
        return sum(2 * layer.mixer.num_kv_heads * layer.mixer.head_dim * itemsize for layer in self.layers)


def parts(value: Any) -> Iterator[Any]:
    """The dataclasses that a configuration or a part of one is made of, itself first."""
    if isinstance(value, tuple):
        for item in value:
            yield from parts(item)
    elif dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name))


def _alike(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    rope_dim: int,
    rope_scaling: RopeScaling | None = None,
    sliding_window: int = 0,
    dense_layers: Collection[int] = (),
    **of_feed_forward: Any,
) -> tuple[LayerSpec, ...]:
    """Layers that differ in nothing but whether they have experts."""
    if not 0 < num_layers <= MOST_LAYERS:
        raise ValueError(f"num_layers is {num_layers}; it must be from 1 to {MOST_LAYERS}")
    attention = Attention(num_heads, num_kv_heads, head_dim, Rope(rope_theta, rope_dim, rope_scaling), sliding_window)
    layer = LayerSpec(attention, _feed_forward(**of_feed_forward))
    dense = LayerSpec(attention, _feed_forward(**of_feed_forward | {"num_experts": 0}))
    return tuple(dense if number in dense_layers else layer for number in range(num_layers))


def _feed_forward(
    *,
    intermediate_size: int = 0,
    num_experts: int = 0,
    experts_per_token: int = 0,
    expert_intermediate_size: int = 0,
    norm_topk_prob: bool = False,
    expert_weights_scale: float = 1.0,
) -> Dense | Mixture:
    if not num_experts:
        return Dense(intermediate_size)
    return Mixture(num_experts, experts_per_token, expert_intermediate_size, norm_topk_prob, expert_weights_scale)


def _changed(config: ModelConfig, of_layers: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The layers of `config` with other numbers, given as the keywords of ModelConfig."""
    of_layers, layers = dict(of_layers), config.layers
    count = of_layers.pop("num_layers", len(layers))
    if count != len(layers):
        if len(set(layers)) > 1:
            raise ValueError(f"num_layers is {count}, but the {len(layers)} layers differ; state `layers`")
        layers = layers[:1] * count
    if "num_experts" in of_layers and bool(of_layers["num_experts"]) != bool(config.expert_layers):
        names = [name for name, (kind, _, _) in _OF_LAYERS.items() if kind in (Dense, Mixture)]
        feed_forward = _feed_forward(**{name: of_layers.get(name, getattr(config, name)) for name in names})
        layers = tuple(dataclasses.replace(layer, feed_forward=feed_forward) for layer in layers)
    if unknown := of_layers.keys() - _OF_LAYERS.keys():
        raise TypeError(f"ModelConfig has no field {', '.join(sorted(unknown))} that can be changed in all layers")
    changes = {_OF_LAYERS[name][:2]: value for name, value in of_layers.items()}

    def revised(part: Any) -> Any:
        values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return type(part)(**{
            name: changes.get((type(part), name), revised(value) if dataclasses.is_dataclass(value) else value)
            for name, value in values.items()
        })  # fmt: skip

    return tuple(revised(layer) for layer in layers)


_KINDS = {"mixer": (Attention,), "feed_forward": (Dense, Mixture), "rope": (Rope,), "scaling": (RopeScaling,)}


def _decoded(kinds: tuple[type, ...], fields: Mapping[str, Any]) -> Any:
    """The dataclass, of that kind whose fields these are."""
    values = {
        name: value if name not in _KINDS or value is None else _decoded(_KINDS[name], value) for name, value in fields.items()
    }
    for kind in kinds:
        known = dataclasses.fields(kind)
        required = {field.name for field in known if field.default is dataclasses.MISSING}
        if required <= values.keys() <= {field.name for field in known}:
            return kind(**values)
    raise TypeError(f"{' or '.join(kind.__name__ for kind in kinds)}: not the fields of one: {', '.join(map(str, values))}")


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
        num_layers=meta.integer("block_count", high=MOST_LAYERS),
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
