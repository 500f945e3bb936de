"""Mistakes that an implementation of attention over latent vectors can make, each put into our own source: the goldens must
fail."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.config import Attention
from ferrum_jax.families import deepseek2, grouped
from ferrum_jax.models import latent
from pallas_kernels.routing import xla as routing
from support.golden_checks import check_logits
from support.goldens import tiny_latent, tiny_models
from support.patching import Fault, applied


def logits(name: str = "deepseek3", kind: str = "gguf") -> None:
    """The golden of the logits of the two shortest prompts."""
    jax.clear_caches()  # earlier traces have no fault in them, or another one
    spec = next(spec for spec in tiny_latent.CASES if spec.name == name)
    with tempfile.TemporaryDirectory() as folder, np.load(tiny_latent.HERE / f"{name}.npz") as file:
        path = Path(folder) / "model.gguf"
        (tiny_latent.write_gguf if kind == "gguf" else tiny_latent.write_directory)(spec, path)
        prompts = tiny_models.prompts(spec.vocab, lengths=tiny_latent.LENGTHS[:2])
        check_logits(fj.load(path, dtype="float32"), dict(file), prompts)


of_directory = functools.partial(logits, kind="directory")
of_v2 = functools.partial(logits, "deepseek2")


@functools.cache
def sound(guard: Callable[[], None]) -> None:
    """The guard passes without a fault; once is enough."""
    guard()


FAULTS = {
    "halves": Fault(
        "rotated pairs are not neighbors", latent._turned, "[x[..., 0::2], x[..., 1::2]]", "jnp.split(x, 2, axis=-1)", logits
    ),
    "normed": Fault(
        "the rotated key is normalized",
        latent.LatentAttention.__call__,
        "_turned(kv[:, None, latent.width :], told.rope)",
        "_turned(rms_norm(kv[:, None, latent.width :], 1.0, _EPS), told.rope)",
        logits,
    ),
    "eps": Fault(
        "the norm of latent vectors has the constant of the others",
        latent.LatentAttention.__call__,
        ".vector(layer), _EPS)",
        ".vector(layer), config.rms_norm_eps)",
        logits,
    ),
    "scale": Fault(
        "scores are without the factor of YaRN", Attention.score_scale.fget, "if scaling is None", "if True", logits
    ),
    "once": Fault("scores have the factor of YaRN once", Attention.score_scale.fget, "+ 1) ** 2", "+ 1)", logits),
    "width": Fault(
        "scores are scaled by the width of what is cached",
        Attention.score_scale.fget,
        "self.latent.nope + self.rope.dim",
        "self.head_dim",
        logits,
    ),
    "twice": Fault(
        "cos and sin have the factor of YaRN too",
        deepseek2._from_gguf,
        "scaling.attention_factor / rope.magnitude(scaling.factor)",
        "scaling.attention_factor",
        logits,
    ),
    "weights": Fault(
        "the bias of the choice is in the weights", routing.route, "if choice is not scores:", "if False:", logits
    ),
    "groups": Fault("experts come from all groups", routing.route, "if router.groups > 1:", "if False:", logits),
    "best": Fault(
        "a group of DeepSeek V2 is as good as its two best",
        grouped._grouped,
        'groups == 1 or fields["router_scoring"] == "softmax"',
        "groups == 1",
        of_v2,
    ),
    "turned": Fault(
        "keys are not transposed by head",
        deepseek2._key_rows,
        "[:, : _attention_of(spec)[1].nope].reshape(-1)",
        "[:, : _attention_of(spec)[1].nope].T.reshape(-1)",
        of_directory,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    sound(fault.guard)
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
