"""Mistakes that an implementation of gpt-oss can make, each put into our own source: the goldens must fail."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.families import gpt_oss
from ferrum_jax.models import layers, rope
from ferrum_jax.weights import fused
from pallas_kernels import grouped_matmul
from pallas_kernels.paged_attention import xla
from support.golden_checks import check_logits
from support.goldens import directory_cases, golden_cases, tiny_directories, tiny_models
from support.patching import Fault, applied


def of_gguf() -> None:
    """The golden of the longest prompt's logits, from a GGUF file."""
    spec = next(case.spec for case in golden_cases.CASES if case.name == "gpt-oss-f32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        tiny_models.write(spec, path)
        _check(path, golden_cases.HERE / "gpt-oss-f32.npz", spec.vocab)


def of_directory(name: str = "gpt-oss-bf16") -> None:
    """The same from a directory."""
    spec = next(case for case in directory_cases.CASES if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        tiny_directories.write(spec, Path(folder))
        _check(Path(folder), directory_cases.HERE / f"{name}.npz", spec.vocab)


def _check(path: Path, golden: Path, vocab: int) -> None:
    jax.clear_caches()  # earlier traces have no fault in them, or another one
    with np.load(golden) as file:
        check_logits(fj.load(path, dtype="float32"), dict(file), tiny_models.prompts(vocab))


mxfp4 = functools.partial(of_directory, "gpt-oss-mxfp4")
FAULTS = {
    "sinks": Fault("sinks are not in the sum", xla.attention, "column + 1", "column", of_gguf),
    "scaled": Fault("sinks are scaled as scores are", xla.attention, "column + sinks,", "column + sinks * scale,", of_gguf),
    "windows": Fault(
        "odd layers slide", gpt_oss._alternating, "0 if number % 2 else window", "window if number % 2 else 0", of_gguf
    ),
    "rounded": Fault("the range of YaRN is rounded", rope.rope_frequencies, "if scaling.truncate:", "if True:", of_gguf),
    "router": Fault(
        "the router's bias is left out", layers.FeedForward.mixture, "logits + bias.vector(layer)", "logits", of_gguf
    ),
    "softmax": Fault("the softmax is over all experts", layers.router_of, "spec.normalize", "False", of_gguf),
    "gain": Fault("the sigmoid has no gain", grouped_matmul.gated, "clamp.alpha * gate", "gate", of_gguf),
    "one": Fault("up is without its one", grouped_matmul.gated, "(up + 1)", "up", of_gguf),
    "limit": Fault("up is not clamped", grouped_matmul.gated, "jnp.clip(up, -clamp.limit, clamp.limit)", "up", of_gguf),
    "below": Fault(
        "the gate is clamped below too",
        grouped_matmul.gated,
        "jnp.minimum(gate, clamp.limit)",
        "jnp.clip(gate, -1.0, clamp.limit)",
        of_gguf,
    ),
    "halves": Fault(
        "gate and up are halves of the tensor",
        fused.Cut._own,
        "if self.part.interleaved:",
        "if False:",
        of_directory,
    ),
    "nibbles": Fault(
        "the numbers of a block are in the order of the file",
        fused.Cut._blocks,
        "(first & 15) | (second << 4)",
        "codes[..., ::2]",
        mxfp4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
