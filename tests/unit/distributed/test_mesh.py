"""A model over several devices: eight of this machine's CPU in separate processes, and the traces of programs for absent
ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from ferrum_jax import functional, memory
from ferrum_jax.config import Attention, Dense, GatedDeltaNet, LayerSpec, Mixture, ModelConfig, Rope
from ferrum_jax.distributed import Placement
from ferrum_jax.distributed.share import share
from ferrum_jax.mapped import mapped
from ferrum_jax.weights.stream import abstract_parameters, fitted
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Target
from support import environment
from unit.distributed.test_placement import table

CPU = Target("cpu")
ATTENTION = Attention(8, 2, 64, Rope(1e6, 64))
SMALL: dict[str, Any] = {"hidden_size": 256, "vocab_size": 512, "context_length": 64, "rms_norm_eps": 1e-6}
DENSE = ModelConfig(architecture="qwen3", layers=(LayerSpec(ATTENTION, Dense(512)),) * 2, **SMALL)
MIXTURE = dataclasses.replace(DENSE, architecture="qwen3moe", layers=(LayerSpec(ATTENTION, Mixture(8, 2, 256)),) * 2)

FAST = ["engine@expert=2,tensor=2", "llama3-f32@tensor=2"]
SLOW = [
    "qwen3-q8_0@tensor=4", "qwen3moe-q4_k_m@expert=4,tensor=2", "gpt-oss-mxfp4@expert=2,tensor=2",
    "qwen35moe-q8_0@expert=2,tensor=2", "deepseek3-q8_0@tensor=2", "gemma4-moe-q8_0@expert=2,tensor=2",
]  # fmt: skip


# ---- Devices that are there


def on_mesh(folder: Any, *cases: str) -> dict[str, Any]:
    """What support/on_mesh.py finds."""
    command = [sys.executable, "-m", "support.on_mesh", str(folder), *cases]
    ended = subprocess.run(command, env=environment(JAX_PLATFORMS="cpu"), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        found |= json.loads(line)
    assert list(found) == list(cases)
    return found


def check_engine(found: dict[str, Any]) -> None:
    """Tokens are those of one device; the state stays where it is; there are two sums a layer."""
    assert all(found["tokens"])
    count, largest = found["scores"]
    assert count >= 27 and largest < 1e-3
    for name, aliased in found["aliased"].items():
        assert aliased == sum(found["state"]), name
        # In the one layer that is scanned two sums, one for the embedding; logits, and those of prompt tokens if requested.
        logits = 1 if name.startswith("decoding") else 2
        assert Counter(found["collectives"][name]) == {"all-reduce": 3, "all-gather": logits}, name


@pytest.mark.slow
def test_models_on_eight_devices(tmp_path):
    """Logits are those of transformers within 1e-3."""
    found = on_mesh(tmp_path, *FAST)
    check_engine(found[FAST[0]])
    assert found[FAST[1]]["heads"] and found[FAST[1]]["cut"] == 9


@pytest.mark.slow
def test_families_on_eight_devices(tmp_path):
    found = on_mesh(tmp_path, *SLOW)
    assert all(case["heads"] and case["cut"] for case in found.values())


# ---- Traces


def traced(config: ModelConfig, sizes: dict[str, int], format: str = "Q8_0") -> tuple[Counter, set[str]]:
    """How often operations between devices occur in a step, those of a scan's body once, and the backends of all layers."""
    places = table(config, format)
    placement = fitted(Placement.abstract(CPU, sizes), places, config)
    params = abstract_parameters(places, placement)
    cache = memory.abstract_state(config, 4, 16, "float32", placement, 2)
    each = jax.ShapeDtypeStruct((3,), jnp.int32)
    table_of = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = functional.RaggedBatch(each, each, each, each, two, table_of, two)
    with placement.as_default(), dispatch.record() as choices:
        step, _ = mapped(placement, functional.forward, (params, cache, batch), {"config": config})
        jaxpr = jax.make_jaxpr(step)(params, cache, batch)
    return operations(jaxpr.jaxpr), {choice.backend for choice in choices if choice.operation == "decoder_layers"}


def operations(jaxpr: Any) -> Counter:
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant")
        found[name] += name in ("psum", "all_gather", "all_to_all", "ppermute", "psum_scatter")
        for inner in jaxprs_in_params(equation.params):
            found += operations(inner)
    return +found


@pytest.mark.parametrize(
    ("config", "sizes", "sums"),
    [
        (DENSE, {"tensor": 2}, 2),
        (MIXTURE, {"tensor": 4}, 2),
        (MIXTURE, {"expert": 4, "tensor": 2}, 2),
        (MIXTURE, {"expert": 8}, 1),  # of the experts
        (DENSE, {"expert": 8}, 0),  # the vocabulary alone is cut
    ],
)
def test_a_layer_has_two_sums(config: ModelConfig, sizes: dict[str, int], sums: int):
    """One more is of the embedding; the logits are gathered once."""
    found, backends = traced(dataclasses.replace(config, dtype="int8"), sizes)
    assert found == {"psum": sums + 1, "all_gather": 1}
    assert not sums or backends == {"composed"}


def test_attention_is_cut_in_whole_heads_or_stays_whole():
    """Of eight heads of 64 with two of keys and values: 512 columns are two blocks of 256, three devices share nothing."""

    def own(devices: int, format: str, config: ModelConfig = DENSE) -> tuple[int, int]:
        placement = fitted(Placement.abstract(CPU, {"tensor": devices}), table(config, format), config)
        mixer = share(config, placement).layers[0].mixer
        cut = memory.abstract_state(config, 4, 16, "float32", placement).pools[0].pages
        assert cut.sharding.shard_shape(cut.shape)[3] == 2 * mixer.num_kv_heads
        return mixer.num_heads, mixer.num_kv_heads

    assert [own(devices, "Q8_0") for devices in (1, 2, 3, 4, 8)] == [(8, 2), (4, 1), (8, 2), (2, 1), (1, 1)]
    assert [own(devices, "Q4_K") for devices in (2, 4)] == [(4, 1), (8, 2)]
    odd = dataclasses.replace(DENSE, num_heads=12, num_kv_heads=6)  # four devices: three heads each, of one and a half
    assert [own(devices, "Q8_0", odd) for devices in (2, 4)] == [(6, 3), (12, 6)]
    uneven = [LayerSpec(ATTENTION, Dense(512)), LayerSpec(dataclasses.replace(ATTENTION, num_kv_heads=1), Dense(512))]
    merged = dataclasses.replace(DENSE, layers=tuple(uneven))  # whose pools would become one
    assert own(2, "Q8_0", merged) == (8, 2)


def test_layers_that_recur_are_whole_on_every_device():
    delta = GatedDeltaNet(2, 4, 64, 64, taps=4, tiled=True)
    gated = [LayerSpec(delta, Dense(512)), LayerSpec(dataclasses.replace(ATTENTION, gated=True), Dense(512))]
    found, _ = traced(ModelConfig(architecture="qwen35", layers=tuple(gated), **SMALL), {"tensor": 2})
    assert found == {"psum": 1 + 2 + 1, "all_gather": 1}
