"""Mistakes that an implementation of Gemma can make, each put into our own source: the goldens must fail."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.families import gemma3
from ferrum_jax.models import decoder, layers, rope
from ferrum_jax.state import kv_layers
from ferrum_jax.weights import changed
from support.golden_checks import check_logits
from support.goldens import tiny_gemma, tiny_models
from support.patching import Fault, applied


def golden(name: str, count: int = 1) -> None:
    """The golden of the shortest prompt's logits, or of the `count` shortest ones."""
    jax.clear_caches()  # earlier traces have no fault in them, or another one
    spec = next(case for case in tiny_gemma.CASES if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model" if spec.dtype == "BF16" else "model.gguf")
        (tiny_gemma.write_directory if spec.dtype == "BF16" else tiny_gemma.write_gguf)(spec, path)
        with np.load(tiny_gemma.HERE / f"{name}.npz") as file:
            prompts = tiny_models.prompts(spec.vocab, lengths=tiny_gemma.LENGTHS[:count])
            check_logits(fj.load(path, dtype="float32"), dict(file), prompts)


_OF = {name: functools.partial(golden, name) for name in ("gemma3", "gemma3-bf16", "gemma4", "gemma4-q8_0", "gemma4-moe")}
_TURNED = {name: functools.partial(golden, name, 2) for name in _OF}  # a single token is not
_BLOCK, _EMBEDDED, _ATTENTION = layers.Block.__call__, decoder.Decoder.embedded, layers.Attention.__call__
_MIXTURE = layers.FeedForward.mixture
FAULTS = {
    "one": Fault(
        "norms are without their one",
        changed.Changed.read_range,
        "self.values(plain_numbers(numbers, self.info.format))",
        "plain_numbers(numbers, self.info.format)",
        _OF["gemma3-bf16"],
    ),
    "base": Fault(
        "all layers turn like those without a window",
        gemma3._from_gguf,
        "lambda full: Rope(local, full.dim)",
        "lambda full: full",
        _TURNED["gemma3"],
    ),
    "erf": Fault(
        "GELU is not in its tanh form",
        layers.gelu,
        "if not _varies():",
        "if True:\n        return jax.nn.gelu(x, approximate=False)\n    if not _varies():",
        _OF["gemma3"],
    ),
    "embedding": Fault("embeddings are not scaled", _EMBEDDED, "product(x, self.config.embedding_scale)", "x", _OF["gemma3"]),
    "after attention": Fault(
        "attention's output is not normalized", _BLOCK, 'self.norm(y, "attention_output_norm", layer)', "y", _OF["gemma3"]
    ),
    "scale": Fault(
        "scores are scaled by the width of a head",
        _ATTENTION,
        "told.metadata, spec.score_scale",
        "told.metadata, spec.head_dim**-0.5",
        _TURNED["gemma3-bf16"],
    ),
    "whose keys": Fault(
        "a layer reads the keys of the first layer of its kind",
        kv_layers,
        "last[_shape(mixer)] = number",
        "last.setdefault(_shape(mixer), number)",
        _OF["gemma4"],
    ),
    "values": Fault("values are not normalized", _ATTENTION, "if spec.value_norm:", "if False:", _OF["gemma4-q8_0"]),
    "still": Fault(
        "all pairs turn", rope.rope_angles, "if factors is not None and rope.factored:", "if False:", _TURNED["gemma4-q8_0"]
    ),
    "cap": Fault(
        "logits are not capped",
        decoder.Decoder.logits,
        "cap * jnp.tanh(logits / cap) if cap else logits",
        "logits",
        _OF["gemma4"],
    ),
    "layer": Fault("a layer's result is not scaled", _BLOCK, "product(x, scale.vector(layer))", "x", _OF["gemma4-q8_0"]),
    "input": Fault("layers get the first one's input", _BLOCK, "inputs, layer.number, 1", "inputs, 0, 1", _OF["gemma4"]),
    "known input": Fault(
        "what layers get of an id is not scaled", decoder.Decoder.inputs, "made.shape[-1] ** 0.5", "1.0", _OF["gemma4"]
    ),
    "router": Fault(
        "the router reads what the experts read",
        _MIXTURE,
        "routed = rms_norm(stream, scale * config.hidden_size**-0.5, config.rms_norm_eps)",
        "routed = x",
        _OF["gemma4-moe"],
    ),
    "router scale": Fault(
        "the router's input is not made small", _MIXTURE, "scale * config.hidden_size**-0.5", "scale", _OF["gemma4-moe"]
    ),
    "stream": Fault(
        "experts read what the dense feed-forward reads",
        _MIXTURE,
        'self.norm(stream, "expert_norm", layer)',
        'self.norm(x, "expert_norm", layer)',
        _OF["gemma4-moe"],
    ),
    "expert scale": Fault(
        "experts are not scaled", _MIXTURE, 'scales.vector(layer).at[expert_ids].get(mode="clip")', "1", _OF["gemma4-moe"]
    ),
    "apart": Fault(
        "the experts' sum is not normalized", _MIXTURE, 'self.norm(y, "expert_output_norm", layer)', "y", _OF["gemma4-moe"]
    ),
}


@functools.cache
def holds(guard) -> None:
    """Without a fault; once for each golden."""
    guard()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    holds(fault.guard)
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
