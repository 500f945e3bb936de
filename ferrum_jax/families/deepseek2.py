"""DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437), Kimi K2 and GLM-4.7-Flash: attention over latent vectors.

In GGUF files the matrix that makes keys and values of a latent vector is two tensors with an axis for heads, the keys'
transposed; older files have it as directories do, `attn_kv_b`, and then it is split and transposed while it is read. Newer
files describe heads as they attend: one for keys, as wide as what is cached of a token.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import Attention, Latent, LayerSpec, ModelConfig, RopeScaling
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families import decoder, grouped, rope, tensors
from ferrum_jax.families.family import ConfigFile, Family
from ferrum_jax.families.fields import FIELDS
from ferrum_jax.families.keys import AT_LEAST_ZERO, SCALE, Keys, shown
from ferrum_jax.families.table import Change, Tensor
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo

_WIDTHS = {"high": 2**13}
_LOG_KEY = "rope.scaling.yarn_log_multiplier"

# ---- tensors


def _attention_of(spec: LayerSpec) -> tuple[Attention, Latent]:
    assert isinstance(spec.mixer, Attention) and spec.mixer.latent is not None
    return spec.mixer, spec.mixer.latent


def _heads(spec: LayerSpec) -> int:
    return _attention_of(spec)[0].num_heads


def _rows(spec: LayerSpec) -> np.ndarray:
    """The rows of the matrix of keys and values by head."""
    mixer, latent = _attention_of(spec)
    each = latent.nope + latent.values
    return np.arange(mixer.num_heads * each).reshape(mixer.num_heads, each)


def _key_rows(spec: LayerSpec) -> np.ndarray:
    return _rows(spec)[:, : _attention_of(spec)[1].nope].reshape(-1)


def _value_rows(spec: LayerSpec) -> np.ndarray:
    return _rows(spec)[:, _attention_of(spec)[1].nope :].reshape(-1)


def _has_query_width(spec: LayerSpec) -> bool:
    return _attention_of(spec)[1].query_width > 0


def _has_no_query_width(spec: LayerSpec) -> bool:
    return not _has_query_width(spec)


def _row(stem: str, name: str, axes: tuple[str, ...], module: str | Change, **more: Any) -> Tensor:
    modules = (module if isinstance(module, Change) else f"self_attn.{module}",)
    return Tensor(f"{stem}.weight", ("attention", name), axes, modules, **more)


def _by_head(stem: str, name: str, axes: tuple[str, ...], change: Change) -> Tensor:
    of_directory = dataclasses.replace(change, tensor="self_attn.kv_b_proj.weight")
    return _row(stem, name, axes, of_directory, elsewhere=dataclasses.replace(change, tensor="attn_kv_b.weight"))


_ATTENTION = (
    tensors.attention()[0],
    _row("attn_q", "query", ("query_rows", "hidden"), "q_proj", layers=_has_no_query_width),
    _row("attn_q_a", "query_a", ("query_width", "hidden"), "q_a_proj", layers=_has_query_width),
    _row("attn_q_a_norm", "query_norm", ("query_width",), "q_a_layernorm", layers=_has_query_width),
    _row("attn_q_b", "query_b", ("query_rows", "query_width"), "q_b_proj", layers=_has_query_width),
    _row("attn_kv_a_mqa", "key_value_a", ("latent_rows", "hidden"), "kv_a_proj_with_mqa"),
    _row("attn_kv_a_norm", "latent_norm", ("latent",), "kv_a_layernorm"),
    _by_head("attn_k_b", "key_b", ("query_heads", "latent", "nope"), Change("", _key_rows, matrices=_heads, turned=True)),
    _by_head("attn_v_b", "value_b", ("query_heads", "value", "latent"), Change("", _value_rows, matrices=_heads)),
    _row("attn_output", "output", ("hidden", "heads"), "o_proj"),
)


def _sizes(config: ModelConfig, spec: LayerSpec | None) -> Mapping[str, int | tuple[int, int]]:
    found = tensors.sizes(config, spec)
    if spec is None:
        return found
    mixer, latent = _attention_of(spec)
    return found | {
        "heads": (mixer.num_heads, latent.values),
        "query_heads": mixer.num_heads,
        "query_rows": (mixer.num_heads, latent.nope + mixer.rope.dim),
        "query_width": latent.query_width,
        "latent": latent.width,
        "latent_rows": mixer.head_dim,
        "nope": latent.nope,
        "value": latent.values,
    }


# ---- keys


def _with(config: ModelConfig, latent: Latent, dim: int, scaling: RopeScaling | None) -> ModelConfig:
    """The configuration with attention over latent vectors."""

    def layer(spec: LayerSpec) -> LayerSpec:
        assert isinstance(spec.mixer, Attention)
        turned = dataclasses.replace(spec.mixer.rope, dim=dim, scaling=scaling)
        return dataclasses.replace(spec, mixer=dataclasses.replace(spec.mixer, rope=turned, latent=latent))

    return dataclasses.replace(config, layers=tuple(map(layer, config.layers)))


def _from_gguf(family: Family, keys: Keys, found: Mapping[str, TensorInfo]) -> ModelConfig:
    width, dim = keys.integer("attention.kv_lora_rank", **_WIDTHS), keys.integer("rope.dimension_count", **_WIDTHS)
    newer = keys.has("attention.key_length_mla")
    names = [f"attention.{name}_length{'_mla' if newer else ''}" for name in ("key", "value")]
    key, values = (keys.integer(name, **_WIDTHS) for name in names)
    if key <= dim:
        raise keys.fail(names[0], f"is {key}; it must be above rope.dimension_count {dim}")
    for name, right in (("attention.key_length", width + dim), ("attention.value_length", width)):
        if newer and keys.integer(name) != right:
            raise keys.fail(name, f"is {keys.get(name)}; with these of the latent vector it must be {right}")
    query = keys.integer("attention.q_lora_rank", low=0, **_WIDTHS) if keys.has("attention.q_lora_rank") else 0
    multiplier = keys.number(_LOG_KEY, AT_LEAST_ZERO) if keys.has(_LOG_KEY) else 0.0
    log = round(10 * multiplier, 6)  # files hold a tenth of it, in float32
    own = {"attention.head_count_kv": 1, "attention.key_length": width + dim}
    gone = {"attention.value_length", _LOG_KEY}
    keys.values = {name: value for name, value in keys.values.items() if name not in gone} | own
    keys.ignore("attention.key_length_mla", "attention.value_length_mla")
    scoring = "softmax"
    if any(name.endswith(".exp_probs_b.bias") for name in found):
        scoring = "sigmoid"
        if not keys.has("expert_gating_func") or not keys.integer("expert_gating_func", low=0):
            text = "is missing; the biases exp_probs_b are those of DeepSeek V3, so sigmoid is taken (llama.cpp takes softmax)"
            warnings.warn(str(keys.fail("expert_gating_func", text)), stacklevel=2)
    config = decoder.from_gguf(family, keys, found, theta=10_000.0, feed_forward=partial(grouped.from_gguf, scoring=scoring))
    scaling = config.rope_scaling
    if log and scaling is not None and scaling.kind == "yarn":  # cos and sin stay as they are: the scores get all of it
        attention = scaling.attention_factor / rope.magnitude(scaling.factor)
        scaling = dataclasses.replace(scaling, attention_factor=attention)
    return _with(config, Latent(width, key - dim, values, query, log), dim, scaling)


_V2 = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_intermediate_size": 1407,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V3 = _V2 | {
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 2048,
}
_FLASH = _V3 | {
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "moe_intermediate_size": 1536,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}


def _from_json(family: Family, keys: Keys, path: Path, *, defaults: Mapping[str, Any], scoring: str) -> ConfigFile:
    """defaults: of the class."""

    def number(key: str, low: int = 1) -> int:
        return keys.integer(key, low=low, **_WIDTHS) if keys.has(key) else defaults[key]

    for key in ("attention_bias", "mlp_bias"):
        if keys.boolean(key, False):
            raise keys.unsupported(key, "true is not supported in this model class")
    if not keys.boolean("rope_interleave", True):
        raise keys.unsupported("rope_interleave", "false is not supported")
    heads = keys.integer("num_attention_heads", high=2**16)
    if keys.has("num_key_value_heads") and keys.integer("num_key_value_heads") != heads:
        raise keys.fail("num_key_value_heads", f"is {keys.get('num_key_value_heads')}; it must be num_attention_heads {heads}")
    width, dim, log = number("kv_lora_rank"), number("qk_rope_head_dim"), _score_log(keys)
    query = 0 if keys.values.get("q_lora_rank", 0) is None else number("q_lora_rank")
    latent = Latent(width, number("qk_nope_head_dim"), number("v_head_dim"), query, log)
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    predicting = [keys.integer(name, low=0, high=64) for name in names if keys.has(name)]
    keys.ignore("q_lora_rank")
    keys.values |= {"head_dim": width + dim, "num_key_value_heads": 1}
    if dim % 2:
        raise keys.fail("qk_rope_head_dim", f"is {dim}; it must be even")

    def experts(keys: Keys, layers: int) -> decoder.Fields:
        _leading_dense(keys, layers)
        return grouped.from_json(keys, layers, scoring=scoring, defaults=defaults)

    file = decoder.from_json(family, keys, path, feed_forward=experts)
    if file.rope_factors is not None:
        raise keys.unsupported("rope_scaling", "llama3 is not supported in this model class")
    assert isinstance(file.config, ModelConfig)
    config = _with(file.config, latent, dim, file.config.rope_scaling)
    optional = {"exp_probs_b.bias": scoring == "sigmoid"}
    return dataclasses.replace(file, config=config, predicting=max(predicting, default=1), optional=optional)


def _score_log(keys: Keys) -> float:
    """mscale_all_dim of YaRN, 0 for none."""
    stated = keys.get("rope_scaling") or keys.get("rope_parameters")
    if not isinstance(stated, dict) or (stated.get("rope_type") or stated.get("type")) != "yarn":
        return 0.0
    inner = Keys(stated, "", f"{keys.source}: key rope_scaling")
    return inner.number("mscale_all_dim", SCALE) if inner.has("mscale_all_dim") else 0.0


def _leading_dense(keys: Keys, layers: int) -> None:
    """Turns a list of kinds of layers into the number of dense ones before all others."""
    kinds = keys.get("mlp_layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {"dense", "sparse"}:
        raise keys.fail("mlp_layer_types", f"must say dense or sparse for each of the {layers} layers, not {shown(kinds)}")
    keys.values["first_k_dense_replace"] = dense = kinds.count("dense")
    if "sparse" in kinds[:dense] or dense == layers:
        raise keys.unsupported("mlp_layer_types", "only dense layers before sparse ones are supported")


def _v2_from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    method = keys.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise keys.unsupported("topk_method", f"{shown(method)} is not supported; greedy and group_limited_greedy are")
    if method == "greedy":
        keys.values |= {"n_group": None, "topk_group": None}
    if keys.boolean("norm_topk_prob", False):
        raise keys.unsupported("norm_topk_prob", "true is not supported: transformers does not normalize in this class")
    return _from_json(family, keys, path, defaults=_V2, scoring="softmax")


def _v3_from_json(family: Family, keys: Keys, path: Path, *, defaults: Mapping[str, Any] = _V3) -> ConfigFile:
    scoring = keys.get("scoring_func") or "sigmoid"
    if scoring != "sigmoid":
        raise keys.unsupported("scoring_func", f"{shown(scoring)} is not supported; sigmoid is")
    return _from_json(family, keys, path, defaults=defaults, scoring="sigmoid")


def _to_gguf(config: ModelConfig, where: str) -> dict[str, Typed]:
    mixer, latent = _attention_of(config.layers[0])
    scaling, more = mixer.rope.scaling, {}
    if scaling is not None and scaling.kind == "yarn" and latent.score_log:
        if abs(scaling.attention_factor - 1) > 1e-6:
            text = "mscale other than mscale_all_dim cannot be written as GGUF: files have one number for both"
            raise UnsupportedModelError(f"{where}: {text}")
        scaling = dataclasses.replace(scaling, attention_factor=rope.magnitude(scaling.factor))
        more[_LOG_KEY] = Typed(0.1 * latent.score_log, "float32")
    plain = _with(config, latent, mixer.rope.dim, scaling)
    typed = decoder.to_gguf(plain, where, feed_forward=grouped.to_gguf)
    widths = {
        "attention.value_length": latent.width,
        "attention.key_length_mla": latent.nope + mixer.rope.dim,
        "attention.value_length_mla": latent.values,
        "attention.kv_lora_rank": latent.width,
    } | ({"attention.q_lora_rank": latent.query_width} if latent.query_width else {})
    more |= {key: Typed(value, "uint32") for key, value in widths.items()}
    return typed | {f"{config.architecture}.{key}": entry for key, entry in more.items()}


DEEPSEEK3 = Family(
    architecture="deepseek2",
    model_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    tensors=tensors.decoder((*_ATTENTION, tensors.FEED_FORWARD_NORM, *grouped.feed_forward(biased=False))),
    sizes=_sizes,
    from_gguf=_from_gguf,
    from_json=_v3_from_json,
    to_gguf=_to_gguf,
    fields=FIELDS["deepseek_v3"] | {"scoring_func"},
)
KIMI_K2 = dataclasses.replace(DEEPSEEK3, model_type="kimi_k2")
DEEPSEEK2 = dataclasses.replace(
    DEEPSEEK3,
    model_class="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    from_json=_v2_from_json,
    fields=None,
)
GLM4_FLASH = dataclasses.replace(
    DEEPSEEK3,
    model_class="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    from_json=partial(_v3_from_json, defaults=_FLASH),
    fields=None,
)
