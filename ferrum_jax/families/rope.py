"""Rotary positions in the keys of files: read from GGUF and config.json, written to GGUF.

All three say the same few things under other names: theta, and a scaling that is linear, YaRN (arXiv 2309.00071) or that of
LLaMA-3.1, which GGUF files state as divisors of the frequencies.
"""

from __future__ import annotations

import math

import numpy as np

from ferrum_jax.config import RopeScaling
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.families.fields import ROPE_FIELDS
from ferrum_jax.families.keys import AT_LEAST_ZERO, ATTENTION_FACTOR, FACTOR, SCALE, THETA, TURNS, Keys, Range, shown
from ferrum_jax.files.metadata import Typed

_JSON_KINDS = ("default", "linear", "llama3", "yarn")


def scaling_from_gguf(keys: Keys) -> RopeScaling | None:
    """A factor without a type means linear scaling, as the format defines; type "none" means no scaling."""
    keys.ignore("rope.scaling.finetuned", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length")
    keys.ignore(*(f"rope.scaling.yarn_{name}" for name in ("log_multiplier", "beta_fast", "beta_slow")))
    kind = keys.get("rope.scaling.type") if keys.has("rope.scaling.type") else "linear"
    if not isinstance(kind, str):
        raise keys.fail("rope.scaling.type", f"must be a string, not {shown(kind)}")
    if kind not in ("none", "linear", "yarn"):
        raise keys.unsupported("rope.scaling.type", f"{kind!r:.100} is not supported")
    attention = 1.0
    if keys.has("rope.scaling.attn_factor"):
        attention = keys.number("rope.scaling.attn_factor", ATTENTION_FACTOR)
    if kind == "none":
        if attention != 1.0:
            raise keys.unsupported("rope.scaling.attn_factor", "needs a scaling type")
        return None
    if kind == "linear":
        key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if keys.has(key)), "rope.scaling.factor")
        factor = keys.number(key, AT_LEAST_ZERO) if keys.has(key) else 0.0  # converters write 0 for "none"
        factor = keys.number(key, FACTOR) if factor else 0.0
        if not factor and keys.has("rope.scaling.type"):
            raise keys.fail("rope.scaling.factor", "is missing")
        return RopeScaling("linear", factor or 1.0, attention_factor=attention) if factor or attention != 1.0 else None

    factor = keys.number("rope.scaling.factor", FACTOR)
    if keys.has("rope.scaling.yarn_log_multiplier") and keys.number("rope.scaling.yarn_log_multiplier", AT_LEAST_ZERO):
        raise keys.unsupported("rope.scaling.yarn_log_multiplier", "not supported")
    fast, slow = _turns(keys, "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
    return RopeScaling(
        "yarn",
        factor,
        original_context=keys.integer("rope.scaling.original_context_length"),
        attention_factor=attention * magnitude(factor),
        beta_fast=fast,
        beta_slow=slow,
    )


def scaling_to_gguf(scaling: RopeScaling | None) -> dict[str, Typed]:
    """The keys that state it, without the prefix of the architecture."""
    if scaling is None:
        return {}
    keys = {"rope.scaling.type": Typed(scaling.kind, "string"), "rope.scaling.factor": Typed(scaling.factor, "float32")}
    attention = scaling.attention_factor
    if scaling.kind == "yarn":
        keys["rope.scaling.original_context_length"] = Typed(scaling.original_context, "uint32")
        attention /= magnitude(scaling.factor)
        keys["rope.scaling.yarn_beta_fast"] = Typed(scaling.beta_fast, "float32")
        keys["rope.scaling.yarn_beta_slow"] = Typed(scaling.beta_slow, "float32")
    if abs(attention - 1.0) > 1e-6:
        keys["rope.scaling.attn_factor"] = Typed(attention, "float32")
    return keys


def rotated_of_json(keys: Keys, head_dim: int, default: float) -> int:
    """How many values of a head are rotated, in a class that may rotate a part of them; `default` where no key says so."""
    key, stated = "partial_rotary_factor", keys.get("rope_scaling") or keys.get("rope_parameters")
    inner = isinstance(stated, dict) and stated.get(key) is not None
    place = Keys(stated, "", f"{keys.source}: rope_parameters") if inner else keys
    part = place.number(key, Range(0.0, 1.0)) if place.has(key) else default
    rotated = int(head_dim * part)
    if rotated < 2 or rotated % 2:
        raise place.fail(key, f"{part} of {head_dim} values of a head is not an even number of them")
    return rotated


def from_json(
    keys: Keys, theta: float, rotated: int, context: int, *, partial: bool = False
) -> tuple[float, RopeScaling | None, np.ndarray | None]:
    """theta (`theta` if no key states it), the scaling, and the factors of LLaMA-3.1's scaling. If both objects are present,
    rope_scaling counts. rotated: values of a head that are rotated; partial: whether they may be a part of it."""
    parameters = keys.get("rope_parameters")
    name, stated = ("rope_scaling", keys.get("rope_scaling")) if keys.get("rope_scaling") else ("rope_parameters", parameters)
    if stated is not None and not isinstance(stated, dict):
        raise keys.fail(name, "must be an object")
    given = {key: value for key, value in (stated or {}).items() if value is not None}
    if nested := next((key for key, value in given.items() if isinstance(value, dict)), None):
        raise keys.unsupported(name, f"{nested}: parameters by kind of layer are not supported")
    rope = Keys(given, "", f"{keys.source}: key {name}", ROPE_FIELDS | {"type"})
    for place in (keys, rope):
        theta = place.number("rope_theta", THETA) if place.has("rope_theta") else theta
        if place.has("partial_rotary_factor") and place.number("partial_rotary_factor") != 1.0 and not partial:
            raise place.unsupported("partial_rotary_factor", "only 1 is supported")
    kind, legacy = rope.get("rope_type"), rope.get("type")
    kind = kind or legacy or "default"
    if not isinstance(kind, str) or kind not in _JSON_KINDS:
        known = ", ".join(_JSON_KINDS)
        raise UnsupportedModelError(f"{rope.source}: rope_type {shown(kind)} is not supported; supported: {known}")
    original = context
    for place in (rope, keys):  # if both have it, the latter counts
        if place.has("original_max_position_embeddings") and kind not in ("default", "linear"):
            original = place.integer("original_max_position_embeddings")
    if kind == "default":
        return theta, None, None
    factor = rope.number("factor", FACTOR)
    scaling, factors = None, None
    if kind == "linear":
        scaling = RopeScaling("linear", factor)
    elif kind == "yarn":
        scaling = _yarn(rope, factor, original)
    else:
        factors = _llama3_factors(rope, theta, rotated, factor, original)
    for key, _ in rope.unread():
        raise UnsupportedModelError(f"{rope.source}: {key} is not supported with rope_type {kind!r}")
    return theta, scaling, factors


def _yarn(rope: Keys, factor: float, original: int) -> RopeScaling:
    """YaRN, with the constants of section 3.2 of its paper where the file states none."""
    attention = magnitude(factor)
    each = [rope.number(key, SCALE) if rope.has(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    if rope.has("attention_factor"):
        attention = rope.number("attention_factor", ATTENTION_FACTOR)
    elif all(each):
        attention = magnitude(factor, each[0]) / magnitude(factor, each[1])
    fast, slow = _turns(rope, "beta_fast", "beta_slow")
    return RopeScaling("yarn", factor, original, attention, fast, slow, rope.boolean("truncate", True))


def magnitude(factor: float, scale: float = 1.0) -> float:
    """The factor that YaRN multiplies cos and sin by."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _turns(keys: Keys, fast_key: str, slow_key: str) -> tuple[float, float]:
    """YaRN's beta_fast and beta_slow; its own constants (section 3.2 of the paper) where the file does not override them."""
    fast = keys.number(fast_key, TURNS) if keys.has(fast_key) else 32.0
    slow = keys.number(slow_key, TURNS) if keys.has(slow_key) else 1.0
    if fast < slow:
        raise keys.fail(fast_key, f"is {fast}; it must be at least {slow_key}, {slow}")
    return fast, slow


def _llama3_factors(rope: Keys, theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """LLaMA-3.1's divisors of the rotary frequencies: `factor` for wavelengths that fit into the original context fewer than
    `low_freq_factor` times, 1 for those that fit `high_freq_factor` times, and a blend of frequencies between the two."""
    low, high = rope.number("low_freq_factor", TURNS), rope.number("high_freq_factor", TURNS)
    if high <= low:
        raise rope.fail("high_freq_factor", f"is {high}; it must be above low_freq_factor {low}")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / factor + blend)).astype(np.float32)
