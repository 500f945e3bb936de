"""Synthetic model files: what they state is the shape that was asked for, and their layers run in one C++ call."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ferrum_jax as fj
from benchmarks.make_synthetic import SHAPES, make
from ferrum_jax.weights.gguf import open_gguf
from pallas_kernels import dispatch
from support.compiler import needs_compiler

TINY = [name for name in SHAPES if name.endswith("tiny")]


@pytest.mark.parametrize("name", TINY)
def test_a_file_has_the_tensors_and_keys_of_its_shape(name, tmp_path):
    make(tmp_path / "made.gguf", name)
    with open_gguf(tmp_path / "made.gguf") as source:
        found = source.config()
    rounded = dataclasses.replace(SHAPES[name], rms_norm_eps=float(np.float32(1e-6)))  # as a file has it
    scaling, wanted = found.rope_scaling, rounded.rope_scaling
    assert dataclasses.replace(found, rope_scaling=None) == dataclasses.replace(rounded, rope_scaling=None)
    if wanted is not None:
        assert dataclasses.astuple(scaling) == pytest.approx(dataclasses.astuple(wanted))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_its_layers_run_in_one_call(name, tmp_path):
    make(tmp_path / "made.gguf", name)
    with dispatch.record() as choices:
        (logits,) = fj.load(tmp_path / "made.gguf", dtype="int8").logits([[300, 301, 302, 303]])
    assert {choice.backend for choice in choices if choice.operation == "decoder_layers"} == {"native"}
    assert np.isfinite(logits).all() and logits.std() > 0.1
