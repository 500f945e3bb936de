"""Gemma 4: texts, and the text part of the models of texts, pictures and sounds.

Layers without a window have wider heads, and only the first pairs of these turn: the frequencies of the others are divided by
a number so large that they stand still. The last layers may read the keys and values of earlier ones, and each layer may get
an embedding of its own of each token. In the model with experts each layer has them next to its dense feed-forward: they and
their router read the residual stream through norms of their own, and both results are normalized and added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import Attention, LayerSpec, Mixture, ModelConfig, Rope
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, rope, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.fields import ROPE_FIELDS
from ferrum_jax.families.gemma3 import PATTERN_KEY, complete, default_windows, ropes_of_json, softcap, windows_to_gguf
from ferrum_jax.families.keys import FACTOR, THETA, Keys, Range, shown
from ferrum_jax.families.table import Change, Table, Tensor, every_layer
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo

_STILL = 1e30  # divides the frequency of a pair that does not turn
_WIDTH_KEY = "expert_feed_forward_length"
_INPUT_KEY = "embedding_length_per_layer_input"
_SHARED_KEY = "attention.shared_kv_layers"
_NOTHING_TO_SHARE = "a layer reads the keys and values of one before it, but none is of its kind"
_DEFAULTS = {  # of transformers' class
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}

# ---- tensors


def _attention(spec: LayerSpec) -> Attention:
    assert isinstance(spec.mixer, Attention)
    return spec.mixer


def _shares_keys(spec: LayerSpec) -> bool:
    return _attention(spec).shared_kv


def _has_keys(spec: LayerSpec) -> bool:
    return not _shares_keys(spec)


def _has_values(spec: LayerSpec) -> bool:
    return _has_keys(spec) and not _attention(spec).key_is_value


def _has_inputs(spec: LayerSpec) -> bool:
    return spec.input_width > 0


_QUERY, _KEY, _VALUE, _OUTPUT = tensors.attention()[1:5]
_QUERY_NORM, _KEY_NORM = tensors.HEAD_NORMS
_LAYER = (
    tensors.attention()[0],
    Tensor("post_attention_norm.weight", ("attention_output_norm",), ("hidden",), ("post_attention_layernorm",)),
    Tensor("ffn_norm.weight", ("feed_forward_norm",), ("hidden",), ("pre_feedforward_layernorm",)),
    Tensor("post_ffw_norm.weight", ("feed_forward_output_norm",), ("hidden",), ("post_feedforward_layernorm",)),
    *(_QUERY, _QUERY_NORM, _OUTPUT),
    *(dataclasses.replace(row, layers=_has_keys, ignored=_shares_keys) for row in (_KEY, _KEY_NORM)),
    dataclasses.replace(_VALUE, layers=_has_values, ignored=_shares_keys),
    *(dataclasses.replace(row, layers=every_layer) for row in tensors.dense()),
    *tensors.mixture("router.proj", "experts"),
    Tensor("ffn_gate_inp.scale", ("feed_forward", "router_scale"), ("hidden",), (Change("router.scale"),), tensors.is_mixture),
    Tensor(
        "ffn_down_exps.scale",
        ("feed_forward", "expert_scale"),
        ("routed",),
        (Change("router.per_expert_scale"),),
        tensors.is_mixture,
    ),
    *(
        Tensor(
            f"{name}.weight",
            ("feed_forward", path),
            ("hidden",),
            (f"{module}_feedforward_layernorm_{name[-1]}",),
            tensors.is_mixture,
        )
        for name, path, module in (
            ("post_ffw_norm_1", "shared_output_norm", "post"),
            ("pre_ffw_norm_2", "expert_norm", "pre"),
            ("post_ffw_norm_2", "expert_output_norm", "post"),
        )
    ),
    Tensor("inp_gate.weight", ("input_gate",), ("input", "hidden"), ("per_layer_input_gate",), _has_inputs),
    Tensor("proj.weight", ("input_projection",), ("hidden", "input"), ("per_layer_projection",), _has_inputs),
    Tensor("post_norm.weight", ("input_norm",), ("hidden",), ("post_per_layer_input_norm",), _has_inputs),
    Tensor("layer_output_scale.weight", ("output_scale",), ("one",), (Change("layer_scalar"),), optional=True),
)


def _table(root: str, passed_over: str = "") -> Table:
    whole = (
        Tensor("token_embd.weight", ("embedding",), ("vocab", "hidden"), (f"{root}embed_tokens",)),
        Tensor("output_norm.weight", ("final_norm",), ("hidden",), (f"{root}norm",)),
        tensors.EMBEDDINGS[-1],
        Tensor("rope_freqs.weight", ("rope_factors",), ("rotated",)),
        Tensor(
            "per_layer_token_embd.weight",
            ("inputs_embedding",),
            ("input_vocab", "inputs"),
            (f"{root}embed_tokens_per_layer",),
            _has_inputs,
        ),
        Tensor(
            "per_layer_model_proj.weight",
            ("inputs_projection",),
            ("inputs", "hidden"),
            (f"{root}per_layer_model_projection",),
            _has_inputs,
        ),
        Tensor("per_layer_proj_norm.weight", ("inputs_norm",), ("input",), (f"{root}per_layer_projection_norm",), _has_inputs),
    )
    return Table(whole, _LAYER, f"{root}layers.", tensors.IGNORED, passed_over)


def _sizes(config: ModelConfig, spec: LayerSpec | None) -> Mapping[str, int | tuple[int, int]]:
    width = config.layers[0].input_width
    own: dict[str, int | tuple[int, int]] = {"input": width, "inputs": width * config.num_layers, "one": 1}
    own["input_vocab"] = config.vocab_size
    if spec is not None and isinstance(spec.feed_forward, Mixture):
        own["width"] = spec.feed_forward.shared_width
    return tensors.sizes(config, spec) | own


# ---- keys


def _from_gguf(family: Family, keys: Keys, found: Mapping[str, TensorInfo]) -> ModelConfig:
    config = decoder.from_gguf(family, keys, found, feed_forward=_experts_of_gguf)
    if not isinstance(keys.get(PATTERN_KEY), np.ndarray):
        raise keys.fail(PATTERN_KEY, f"must say true or false for each of the {config.num_layers} layers")
    width = keys.integer("attention.key_length_swa", high=2**14)
    if keys.has("attention.value_length_swa") and (values := keys.integer("attention.value_length_swa")) != width:
        raise keys.unsupported("attention.value_length_swa", f"{values} differs from key_length_swa {width}")
    turned = keys.integer("rope.dimension_count_swa", high=width) if keys.has("rope.dimension_count_swa") else width
    if turned % 2:
        raise keys.fail("rope.dimension_count_swa", f"is {turned}; it must be even")
    theta = keys.number("rope.freq_base_swa", THETA) if keys.has("rope.freq_base_swa") else config.rope_theta
    local: dict[str, Any] = {"head_dim": width, "rope": Rope(theta, turned, factored=False)}
    mixers = []
    for number, mixer in enumerate(config.attentions):
        alike = f"blk.{number}.attn_v.weight" not in found
        mixers.append(dataclasses.replace(mixer, key_is_value=alike, **local if mixer.window else {}))
    shared = keys.integer(_SHARED_KEY, low=0) if keys.has(_SHARED_KEY) else 0
    inputs = keys.integer(_INPUT_KEY, low=0) if keys.has(_INPUT_KEY) else 0
    cap = softcap(keys)
    return _config(config, mixers, shared, inputs, cap, keys.fail(_SHARED_KEY, _NOTHING_TO_SHARE))


def _experts_of_gguf(keys: Keys, layers: int) -> decoder.Fields:
    fields = decoder.mixture_from_gguf(keys, layers, _WIDTH_KEY)
    return fields | ({"shared_expert_size": keys.integers("feed_forward_length", layers)} if "num_experts" in fields else {})


def _experts_of_json(keys: Keys, layers: int) -> decoder.Fields:
    if not keys.boolean("enable_moe_block", False):
        keys.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return decoder.dense_from_json(keys, layers)
    count = keys.integer("num_experts", high=2**16)
    return {
        "num_experts": count,
        "experts_per_token": keys.integer("top_k_experts", high=count),
        "expert_intermediate_size": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": True,
        "shared_expert_size": keys.integer("intermediate_size"),
    }


def _config(
    config: ModelConfig, mixers: Sequence[Attention], shared: int, inputs: int, cap: float, error: Exception
) -> ModelConfig:
    """The configuration with these mixers, of which the last `shared` read the keys and values of one before them, of its
    kind; `error` if there is none. inputs, cap: `input_width` and `logit_softcap`."""
    known, layers = set(), []
    for number, (mixer, spec) in enumerate(zip(mixers, config.layers, strict=True)):
        shares, kind = number >= len(mixers) - shared, (mixer.num_kv_heads, mixer.head_dim, mixer.window)
        if not shares:
            known.add(kind)
        if kind not in known:
            raise error
        alike = mixer.key_is_value and not shares
        mixer = dataclasses.replace(mixer, scale=1.0, value_norm=not shares, key_is_value=alike, shared_kv=shares)
        layers.append(LayerSpec(mixer, dataclasses.replace(spec.feed_forward, activation="gelu_tanh"), inputs))
    return dataclasses.replace(config, layers=tuple(layers), embedding_scale=config.hidden_size**0.5, logit_softcap=cap)


def _from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    complete(keys, _DEFAULTS)
    keys.ignore("use_bidirectional_attention")
    if keys.get("use_bidirectional_attention") not in (None, "vision"):
        raise keys.unsupported("use_bidirectional_attention", "only 'vision' is supported")
    inputs = keys.integer("hidden_size_per_layer_input", low=0)
    rows = keys.get("vocab_size_per_layer_input")
    if inputs and rows not in (None, keys.get("vocab_size")):
        raise keys.unsupported("vocab_size_per_layer_input", f"{shown(rows)} differs from vocab_size")
    full, sliding = ropes_of_json(keys)
    theta, part, factor = _proportional(keys, full)
    keys.values |= {"rope_parameters": None, "rope_scaling": None}
    file = decoder.from_json(family, keys, path, theta=theta, window=_windows_of_json, feed_forward=_experts_of_json)
    config = file.config
    assert isinstance(config, ModelConfig)
    local = rope.from_json(Keys({"rope_parameters": sliding}, "", keys.source), 1e4, config.head_dim, config.context_length)
    shared, alike = keys.integer("num_kv_shared_layers", low=0), keys.boolean("attention_k_eq_v", False)
    wide, mixers = 0, []
    for mixer, (head, count) in zip(config.attentions, _shapes_of_json(keys, config, alike), strict=True):
        turned = Rope(*local[:1], head, *local[1:2], factored=False) if mixer.window else Rope(theta, head)
        wide = wide if mixer.window else head
        mixers.append(
            dataclasses.replace(mixer, num_kv_heads=count, head_dim=head, rope=turned, key_is_value=alike and not mixer.window)
        )
    if keys.boolean("use_double_wide_mlp", False):
        name = "shared_expert_size" if config.num_experts else "intermediate_size"
        width, once = getattr(config, name), config.num_layers - shared
        config = config.with_by_layer(**{name: (width,) * once + (2 * width,) * shared})
    cap = softcap(keys)
    config = _config(config, mixers, shared, inputs, cap, keys.fail("num_kv_shared_layers", _NOTHING_TO_SHARE))
    factors = np.where(np.arange(wide // 2) < int(part * wide // 2), factor, _STILL).astype(np.float32)
    return dataclasses.replace(file, config=config, rope_factors=factors)


def _proportional(keys: Keys, stated: dict[str, Any]) -> tuple[float, float, float]:
    """Of layers without a window: theta, the part of a head's pairs that turn, and what divides their frequencies."""
    stated = stated or {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    inner = Keys(stated, "", f"{keys.source}: key rope_parameters.full_attention", ROPE_FIELDS)
    kind = inner.get("rope_type") or "default"
    if kind not in ("default", "proportional"):
        raise UnsupportedModelError(
            f"{inner.source}: rope_type {shown(kind)} is not supported; supported: default, proportional"
        )
    theta = inner.number("rope_theta", THETA) if inner.has("rope_theta") else 1e6
    if kind == "default":
        inner.ignore("partial_rotary_factor")
    part = inner.number("partial_rotary_factor", Range(0.0, 1.0)) if inner.has("partial_rotary_factor") else 1.0
    factor = inner.number("factor", FACTOR) if inner.has("factor") else 1.0
    for key, _ in inner.unread():
        raise UnsupportedModelError(f"{inner.source}: {key} is not supported with rope_type {kind!r}")
    return (theta, 1.0, 1.0) if kind == "default" else (theta, part, factor)


def _windows_of_json(keys: Keys, layers: int) -> tuple[int, ...]:
    """The window of each layer; the last has none, whatever the file says, as in transformers."""
    windows = decoder.stated_window(keys, layers, some=True)
    if not keys.has("layer_types"):
        windows = default_windows(windows[0], layers)
    return (*windows[:-1], 0)


def _shapes_of_json(keys: Keys, config: ModelConfig, alike: bool) -> list[tuple[int, int]]:
    """The width of heads and the number of heads of keys of each layer. alike: values are keys in layers without a window."""
    own = config.head_dim, config.num_kv_heads
    keys.ignore("global_head_dim", "num_global_key_value_heads")
    stated: Any = keys.get("per_layer_config")
    if stated is None:  # as files had it before
        head = keys.integer("global_head_dim") if keys.has("global_head_dim") else 512
        few = alike and keys.has("num_global_key_value_heads")
        other = {"head_dim": head, "num_key_value_heads": keys.get("num_global_key_value_heads") if few else own[1]}
        stated = {str(number): other for number, mixer in enumerate(config.attentions) if not mixer.window}
    if not isinstance(stated, dict) or not all(isinstance(value, dict) for value in stated.values()):
        raise keys.fail("per_layer_config", "must have an object for each layer that differs")
    found = []
    for number, mixer in enumerate(config.attentions):
        inner = Keys(stated.get(str(number), {}), "", f"{keys.source}: layer {number} of per_layer_config")
        head = inner.integer("head_dim", high=2**14) if inner.has("head_dim") else own[0]
        count = inner.integer("num_key_value_heads", high=2**16) if inner.has("num_key_value_heads") else own[1]
        for key, _ in inner.unread():
            raise UnsupportedModelError(f"{inner.source}: key {key} is not supported")
        if head % 2 or mixer.num_heads % count:
            raise inner.fail("head_dim", f"{head} is not even, or {count} heads of keys do not divide {mixer.num_heads}")
        found.append((head, count))
    for windowed in (True, False):
        widths = {head for (head, _), mixer in zip(found, config.attentions, strict=True) if bool(mixer.window) is windowed}
        if len(widths) > 1:
            raise keys.unsupported("per_layer_config", "heads of several widths in layers of one kind are not supported")
    return found


def _experts_to_gguf(config: ModelConfig, where: str) -> decoder.Fields:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        _WIDTH_KEY: config.expert_intermediate_size,
        "feed_forward_length": config.by_layer("shared_expert_size" if config.num_experts else "intermediate_size"),
    }


def _to_gguf(config: ModelConfig, where: str) -> dict[str, Typed]:
    typed = windows_to_gguf(config, where, feed_forward=_experts_to_gguf)
    sliding = next((mixer for mixer in config.attentions if mixer.window), config.attentions[0])
    shared = [mixer.shared_kv for mixer in config.attentions]
    integers = {
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "rope.dimension_count_swa": sliding.rope.dim,
        "attention.sliding_window": max(mixer.window for mixer in config.attentions),
        _SHARED_KEY: sum(shared),
        _INPUT_KEY: config.layers[0].input_width,
    }
    own = config.attentions[: len(shared) - sum(shared)]
    if any(shared) and [bool(mixer.window) for mixer in own[-2:]] != [True, False]:
        raise UnsupportedModelError(
            f"{where}: keys and values of layers other than the last one with a window, followed by one without, cannot be "
            "shared in GGUF: llama.cpp takes these"
        )
    return typed | {f"{config.architecture}.{key}": Typed(value, "uint32") for key, value in integers.items()}


GEMMA4 = Family(
    architecture="gemma4",
    model_class="Gemma4ForCausalLM",
    model_type="gemma4_text",
    tensors=_table("model."),
    sizes=_sizes,
    from_gguf=_from_gguf,
    from_json=_from_json,
    to_gguf=_to_gguf,
    vocabulary="gemma4",
    windows_in_gguf=True,
)
GEMMA4_VISION = decoder.text_part(
    GEMMA4,
    "Gemma4ForConditionalGeneration",
    "gemma4",
    _table("model.language_model.", r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*"),
)
