"""The configuration of a model, as one frozen value.

`ModelConfig` (of a decoder) and `EncoderConfig` are hashable and are passed to jit as static arguments. Families (families/)
make them from the metadata of a GGUF file or from a config.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ferrum_jax.errors import UnsupportedModelError

MOST_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is "linear" or "yarn" (arXiv 2309.00071)."""

    kind: str
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0  # multiplies cos and sin, including the logarithmic term of YaRN
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # YaRN's range of pairs begins and ends at whole ones


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation of positions: the first `dim` of a head's values are rotated, in the half-split layout. factored: its
    frequencies are divided by the model's `rope_factors`, if it has some."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    factored: bool = True


@dataclasses.dataclass(frozen=True)
class Latent:
    """Of attention whose keys and values are products of one vector of a token, which alone is cached (arXiv 2405.04434).

    width: of that vector; next to it the token has one rotated key for all heads, `rope.dim` wide. nope, values: the widths of
    a head's query and key without rotation, and of its value. query_width: of the vector that queries are products of (0: of
    the hidden state). score_log: YaRN's mscale_all_dim, c in the factor (0.1 c ln(factor) + 1)^2 of the scores.
    """

    width: int
    nope: int
    values: int
    query_width: int = 0
    score_log: float = 0.0


@dataclasses.dataclass(frozen=True)
class Attention:
    """A mixer: grouped-query attention. `window` is the number of positions that a query sees, including its own (0: all).
    `sinks`: each head has one more score, of a position without a value. gated: with each head's query a gate is projected,
    and its sigmoid multiplies the result of the head. scale: of the scores (0: 1 / sqrt(head_dim)). value_norm: values are
    divided by their root mean square in each head. key_is_value: values are the keys as projected. shared_kv: the layer reads
    the keys and values of an earlier one (`state.kv_layers`). With a `latent`, num_kv_heads is 1 and head_dim the width of what
    is cached of a token: the latent vector and the rotated key."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    window: int = 0
    sinks: bool = False
    gated: bool = False
    latent: Latent | None = None
    scale: float = 0.0
    value_norm: bool = False
    key_is_value: bool = False
    shared_kv: bool = False

    @property
    def cached(self) -> int:
        """The numbers of one token that the cache holds."""
        return 0 if self.shared_kv else (1 if self.latent else 2) * self.num_kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        if self.latent is None:
            return self.scale or self.head_dim**-0.5
        scale, scaling = (self.latent.nope + self.rope.dim) ** -0.5, self.rope.scaling
        if scaling is None or scaling.factor <= 1:
            return scale
        return scale * (0.1 * self.latent.score_log * math.log(scaling.factor) + 1) ** 2


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """A mixer that recurs. A subclass has its sizes as fields, and its module is in `models.layers.MIXERS`."""

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The float32 arrays that it keeps for a sequence in one layer: shapes by name."""
        raise NotImplementedError

    @property
    def kept_axes(self) -> dict[str, tuple[str, ...]]:
        """What the dimensions of these arrays are (`distributed.RULES`); of an array that is not named, all on every device."""
        return {}


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(Recurrent):
    """A mixer: the gated delta net (pallas_kernels.delta_net). taps: of its convolution over time. tiled: value head h has the
    key head h % key_heads; else each key head has consecutive value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    tiled: bool = False

    @property
    def channels(self) -> int:
        """Of the convolution: all queries, keys and values of a token."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {"tail": (self.taps - 1, self.channels), "memory": (self.value_heads, self.key_dim, self.value_dim)}


@dataclasses.dataclass(frozen=True)
class ShortConv(Recurrent):
    """A mixer: a convolution over time of `taps` inputs for each of `width` channels, gated before and after."""

    width: int
    taps: int

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {"tail": (self.taps - 1, self.width)}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A feed-forward: one SwiGLU of this width; or with GELU (arXiv 1606.08415) in its tanh form, if `activation` is
    "gelu_tanh"."""

    width: int
    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A feed-forward: each token goes through `experts_per_token` of `num_experts` SwiGLUs of this width. Their weights are
    normalized to a sum of 1 if `normalize`, then multiplied by `scale`. With a `limit` the SwiGLUs are clamped, and `alpha`
    is the gain of their sigmoid (pallas_kernels.grouped_matmul). `shared_width`: of a SwiGLU that every token goes through as
    well (0: there is none), in some families multiplied by the sigmoid of a number that is projected for it. `activation`: of
    all of them, as of `Dense`. The rest is as of pallas_kernels.routing.Router; a bias of the choice is there if the file has
    one."""

    num_experts: int
    experts_per_token: int
    width: int
    normalize: bool = False
    scale: float = 1.0
    limit: float = 0.0
    alpha: float = 1.0
    shared_width: int = 0
    scoring: str = "softmax"
    eps: float = 0.0
    groups: int = 1
    groups_used: int = 1
    group_best: int = 1
    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The description of one layer. Layers with equal specs and formats share a compiled body. input_width: of the embedding
    of each token that the layer alone gets (0: none)."""

    mixer: Attention | Recurrent
    feed_forward: Dense | Mixture
    input_width: int = 0


# Numbers of layers by their names as keywords and properties of a ModelConfig: the part of a layer that has the number, its
# field, and the value if no layer has such a part.
_OF_LAYERS: dict[str, tuple[type, str, Any]] = {
    "num_heads": (Attention, "num_heads", 0),
    "num_kv_heads": (Attention, "num_kv_heads", 0),
    "head_dim": (Attention, "head_dim", 0),
    "sliding_window": (Attention, "window", 0),
    "attention_sinks": (Attention, "sinks", False),
    "rope_theta": (Rope, "theta", 0.0),
    "rope_dim": (Rope, "dim", 0),
    "rope_scaling": (Rope, "scaling", None),
    "intermediate_size": (Dense, "width", 0),
    "num_experts": (Mixture, "num_experts", 0),
    "experts_per_token": (Mixture, "experts_per_token", 0),
    "expert_intermediate_size": (Mixture, "width", 0),
    "norm_topk_prob": (Mixture, "normalize", False),
    "expert_weights_scale": (Mixture, "scale", 1.0),
    "swiglu_limit": (Mixture, "limit", 0.0),
    "swiglu_alpha": (Mixture, "alpha", 1.0),
    "shared_expert_size": (Mixture, "shared_width", 0),
    "router_scoring": (Mixture, "scoring", "softmax"),
    "router_eps": (Mixture, "eps", 0.0),
    "expert_groups": (Mixture, "groups", 1),
    "expert_groups_used": (Mixture, "groups_used", 1),
    "expert_group_best": (Mixture, "group_best", 1),
}


def _common(name: str) -> Any:
    """A property: the number shared by all layers that have it."""
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
    """The facts that hold for the whole decoder, and its layers.

    `architecture` is its name in GGUF files, `context_length` the most tokens that its positions are made for, `rms_norm_eps`
    the number inside the root of every RMSNorm (arXiv 1910.07467). `dtype` is the arithmetic of matrix products: "float32",
    "bfloat16", "float16" or "int8" (float32 that a product may quantize in blocks); norms, softmax, router, residual stream and
    logits are always float32. `embedding_scale` multiplies the embeddings; with a `logit_softcap` c logits become c tanh(logit
    / c). `implementation`: (operation, backend) pairs, the forced backends of pallas_kernels.

    A model whose layers are alike can be made from keywords instead of `layers`: num_layers, num_heads, num_kv_heads, head_dim,
    rope_theta, rope_dim, rope_scaling, sliding_window, attention_sinks, intermediate_size (of a dense feed-forward),
    num_experts, experts_per_token, expert_intermediate_size, norm_topk_prob, expert_weights_scale, swiglu_limit, swiglu_alpha,
    shared_expert_size, router_scoring, router_eps, expert_groups, expert_groups_used, expert_group_best (of experts),
    dense_layers (those without experts).
    They are also properties. Together with `layers`, as in `dataclasses.replace(config, experts_per_token=2)`, they change
    every layer that has such a number.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    layers: tuple[LayerSpec, ...]
    embedding_scale: float
    logit_softcap: float
    dtype: str
    implementation: tuple[tuple[str, str], ...]

    def __init__(
        self,
        *,
        architecture: str,
        hidden_size: int,
        vocab_size: int,
        context_length: int,
        rms_norm_eps: float,
        layers: Iterable[LayerSpec] | None = None,
        embedding_scale: float = 1.0,
        logit_softcap: float = 0.0,
        dtype: str = "float32",
        implementation: Iterable[tuple[str, str]] = (),
        **of_layers: Any,
    ):
        values = {
            "architecture": architecture,
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "rms_norm_eps": rms_norm_eps,
            "layers": _alike(**of_layers) if layers is None else tuple(layers),
            "embedding_scale": embedding_scale,
            "logit_softcap": logit_softcap,
            "dtype": dtype,
            "implementation": tuple(implementation),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not self.layers:
            raise ValueError("layers is empty")
        if layers is not None and of_layers:
            object.__setattr__(self, "layers", _changed(self, of_layers))

    def __hash__(self) -> int:  # of few parts, because jit computes it at every call
        return hash((self.architecture, self.hidden_size, self.vocab_size, self.dtype, len(self.layers), self.layers[0]))

    num_heads = _common("num_heads")
    num_kv_heads = _common("num_kv_heads")
    head_dim = _common("head_dim")
    sliding_window = _common("sliding_window")
    attention_sinks = _common("attention_sinks")
    rope_theta = _common("rope_theta")
    rope_dim = _common("rope_dim")
    rope_scaling = _common("rope_scaling")
    intermediate_size = _common("intermediate_size")
    num_experts = _common("num_experts")
    experts_per_token = _common("experts_per_token")
    expert_intermediate_size = _common("expert_intermediate_size")
    norm_topk_prob = _common("norm_topk_prob")
    expert_weights_scale = _common("expert_weights_scale")
    swiglu_limit = _common("swiglu_limit")
    swiglu_alpha = _common("swiglu_alpha")
    shared_expert_size = _common("shared_expert_size")
    router_scoring = _common("router_scoring")
    router_eps = _common("router_eps")
    expert_groups = _common("expert_groups")
    expert_groups_used = _common("expert_groups_used")
    expert_group_best = _common("expert_group_best")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def activations(self) -> str:
        """The dtype in which activations reach matrix products."""
        return "float32" if self.dtype == "int8" else self.dtype

    @property
    def attentions(self) -> list[Attention]:
        """The mixers of the layers that attend."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)]

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are a mixture of experts."""
        return tuple(number for number, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Mixture))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The numbers of the dense layers of a model that has mixtures."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.expert_layers))) if self.expert_layers else ()

    def by_layer(self, name: str) -> Any:
        """A number of layers, by the name of its property: one value if all layers that have it agree, else a tuple with one
        for each layer, None for a layer without it."""
        kind, field, absent = _OF_LAYERS[name]
        values = {layer: [getattr(part, field) for part in parts(layer) if type(part) is kind] for layer in set(self.layers)}
        found = {value for of_layer in values.values() for value in of_layer}
        if len(found) > 1:
            return tuple(values[layer][0] if values[layer] else None for layer in self.layers)
        return found.pop() if found else absent

    def with_by_layer(self, **values: Sequence[Any]) -> ModelConfig:
        """The same with numbers of layers, by the names of their properties one value for each layer. A layer that does not
        have such a number stays as it is."""
        layers = list(self.layers)
        for name, of_layers in values.items():
            kind, field, _ = _OF_LAYERS[name]
            layers = [_revised(spec, {(kind, field): value}) for spec, value in zip(layers, of_layers, strict=True)]
        return dataclasses.replace(self, layers=tuple(layers))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From the result of `dataclasses.asdict`, also after JSON, of this version or of one before `layers` existed."""
        known = dict(fields)
        if "layers" in known:
            known["layers"] = [_decoded((LayerSpec,), layer) for layer in known["layers"]]
        elif known.get("rope_scaling") is not None:
            known["rope_scaling"] = _decoded((RopeScaling,), known["rope_scaling"])
        return cls(**known | {"implementation": ()})  # forced backends are a choice for one machine

    @property
    def bytes_per_state(self) -> int:
        """Bytes of what layers that recur keep of one sequence."""
        kept = [shape for spec in self.layers if isinstance(spec.mixer, Recurrent) for shape in spec.mixer.kept.values()]
        return 4 * sum(map(math.prod, kept))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in all layers, with elements of `itemsize` bytes."""
        return sum(mixer.cached * itemsize for mixer in self.attentions)


def parts(value: Any) -> Iterator[Any]:
    """The dataclasses that a configuration or a part of it consists of, itself first."""
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
    attention_sinks: bool = False,
    dense_layers: Collection[int] = (),
    **of_feed_forward: Any,
) -> tuple[LayerSpec, ...]:
    """Layers that differ only in whether they have experts."""
    if not 0 < num_layers <= MOST_LAYERS:
        raise ValueError(f"num_layers is {num_layers}; it must be from 1 to {MOST_LAYERS}")
    rope = Rope(rope_theta, rope_dim, rope_scaling)
    attention = Attention(num_heads, num_kv_heads, head_dim, rope, sliding_window, attention_sinks)
    layer = LayerSpec(attention, _feed_forward(**of_feed_forward))
    dense = LayerSpec(attention, _feed_forward(**of_feed_forward | {"num_experts": 0}))
    return tuple(dense if number in dense_layers else layer for number in range(num_layers))


def _feed_forward(**numbers: Any) -> Dense | Mixture:
    kind = Mixture if numbers.get("num_experts") else Dense
    if unknown := numbers.keys() - {name for name, (of, _, _) in _OF_LAYERS.items() if of in (Dense, Mixture)}:
        raise TypeError(f"ModelConfig has no field {', '.join(sorted(unknown))}")
    return kind(**{field: numbers.get(name, absent) for name, (of, field, absent) in _OF_LAYERS.items() if of is kind})


def _changed(config: ModelConfig, of_layers: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The layers of `config` with changed numbers, given as keywords of ModelConfig."""
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
    return tuple(_revised(layer, changes) for layer in layers)


def _revised(part: Any, changes: Mapping[tuple[type, str], Any]) -> Any:
    """A dataclass with other values of fields, by kind of part and name, in itself and in its parts."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return type(part)(**{
        name: changes.get((type(part), name), _revised(value, changes) if dataclasses.is_dataclass(value) else value)
        for name, value in values.items()
    })  # fmt: skip


_KINDS = {
    "mixer": (Attention, GatedDeltaNet, ShortConv),
    "feed_forward": (Dense, Mixture),
    "rope": (Rope,),
    "scaling": (RopeScaling,),
    "latent": (Latent,),
}


def _decoded(kinds: tuple[type, ...], fields: Mapping[str, Any]) -> Any:
    """An instance of the dataclass that has these fields."""
    values = {
        name: value if name not in _KINDS or value is None else _decoded(_KINDS[name], value) for name, value in fields.items()
    }
    for kind in kinds:
        known = dataclasses.fields(kind)
        required = {field.name for field in known if field.default is dataclasses.MISSING}
        if required <= values.keys() <= {field.name for field in known}:
            return kind(**values)
    raise TypeError(f"{' or '.join(kind.__name__ for kind in kinds)}: not the fields of one: {', '.join(map(str, values))}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shapes and constants of one encoder: post-norm layers, learned positions, GELU by the error function.

    There are `num_types` token types (segments); all tokens of a text have the first. `pooling` is "mean" or "cls".
    `context_length` is the number of positions, `text_length` the number of tokens that a text is cut to by default. `dtype` is
    the arithmetic of products with weights and `implementation` has the forced backends, as in `ModelConfig`.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    num_types: int
    context_length: int
    text_length: int
    layer_norm_eps: float
    pooling: str
    dtype: str = "float32"
    implementation: tuple[tuple[str, str], ...] = ()
    num_experts: ClassVar[int] = 0

    @property
    def layers(self) -> tuple[EncoderConfig, ...]:
        """The description of each layer, which is this configuration for all of them."""
        return (self,) * self.num_layers

    @property
    def activations(self) -> str:
        """The dtype in which activations reach matrix products."""
        return "float32" if self.dtype == "int8" else self.dtype


def refuse_encoder(where: object) -> UnsupportedModelError:
    """The error for an encoder if a model that generates is needed."""
    return UnsupportedModelError(f"{where}: is an embedding model (BERT), which makes no text and has no logits; use `embed`")


def require_experts(config: ModelConfig) -> None:
    """UnsupportedModelError for a model without experts."""
    if not config.expert_layers:
        raise UnsupportedModelError(f"architecture {config.architecture!r}: this model has no experts, so there is no routing")
