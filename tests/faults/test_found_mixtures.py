"""Mistakes that an implementation of routers with sigmoids or of short convolutions can make, each put into our own source: the
goldens must fail."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.families import grouped
from ferrum_jax.models import layers
from ferrum_jax.models.short_conv import ShortConv
from pallas_kernels.routing import xla
from support.golden_checks import check_logits
from support.goldens import tiny_mixtures, tiny_models
from support.patching import Fault, applied
from unit.model import test_mixtures as mixtures


def logits(name: str) -> None:
    """The golden of the shorter prompts' logits."""
    spec = next(case for case in tiny_mixtures.CASES if case.name == name)
    jax.clear_caches()  # earlier traces have no fault in them, or another one
    with tempfile.TemporaryDirectory() as folder, np.load(tiny_mixtures.HERE / f"{name}.npz") as file:
        tiny_mixtures.write_gguf(spec, Path(folder) / "model.gguf")
        model = fj.load(Path(folder) / "model.gguf", dtype="float32")
        check_logits(model, dict(file), tiny_models.prompts(spec.vocab, lengths=tiny_mixtures.LENGTHS)[:2])


def cut() -> None:
    """The bits of a text that is cut into steps."""
    jax.clear_caches()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        mixtures.test_a_text_has_the_same_bits_however_it_is_cut("lfm2moe", Path(folder), patch)


plain, by_group, lfm2 = (functools.partial(logits, name) for name in ("glm4moe", "glm4moe-q8_0", "lfm2moe"))
FAULTS = [
    Fault("the bias is in the weights", xla.route, "take_along_axis(scores,", "take_along_axis(choice,", plain),
    Fault("scores are a softmax", xla.route, 'if router.scoring == "sigmoid":', "if False:", plain),
    Fault("weights have no scale", xla.route, "expert_weights * router.scale", "expert_weights", plain),
    Fault("weights are not normalized", xla.route, "if router.normalize:", "if False:", plain),
    Fault("the bias has no part in the choice", layers.FeedForward.mixture, "None if bias is None else", "None and", plain),
    Fault(
        "there is no shared expert",
        layers.FeedForward.__call__,
        "y + self.shared(x, layer, adapter_mask, self.spec.activation)",
        "y",
        plain,
    ),
    Fault("a group is as good as its best", grouped._grouped, "groups == 1 or", "True or", by_group),
    Fault("all groups are used", xla.route, "if router.groups > 1:", "if False:", by_group),
    Fault("nothing gates the convolution", ShortConv.__call__, "after * y", "y", lfm2),
    Fault("taps are in the other order", ShortConv.recurring, "taps[:, i]", "taps[:, -1 - i]", lfm2),
    Fault("the tail is not of the convolution's inputs", ShortConv.recurring, "window[1:]", "window[:-1]", cut),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_every_fault_is_noticed(fault: Fault) -> None:
    """That they hold without a fault is what unit/model/test_mixtures.py checks."""
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
