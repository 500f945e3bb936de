"""One step of families with further kinds of layers, against PEFT: the loss, and each gradient under PEFT's names."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from ferrum_jax.finetune.lora import LoraAdapter
from ferrum_jax.finetune.peft import named_factors
from ferrum_jax.weights.adapter import read_adapter
from pallas_kernels.delta_net.packed import packed_delta_net
from pallas_kernels.delta_net.reference import delta_net
from support.goldens import finetune_cases
from support.goldens import finetune_families as families
from support.goldens.tiny_directories import safetensors, to_bytes


def started(adapter: LoraAdapter, case: families.Case, path: Path) -> LoraAdapter:
    """The adapter with the golden's numbers, which take the way of a file that PEFT has written."""
    path.mkdir()
    names, _ = named_factors(adapter)
    drawn = {name: families.factor(case, name, values.shape) for name, values in names.items()}
    entries = [(name, "F32", values.shape, to_bytes(values, "F32")) for name, values in drawn.items()]
    (path / "adapter_model.safetensors").write_bytes(safetensors(entries))
    config = {"peft_type": "LORA", "r": families.RANK, "lora_alpha": families.ALPHA, "bias": "none"}
    config["target_parameters"] = list(finetune_cases.EXPERTS) if case.experts else None
    (path / "adapter_config.json").write_text(json.dumps(config))
    found = read_adapter(path, adapter.model).factors
    pairs = {}
    for at, sliced in adapter.pairs.items():
        group, name = at.split(".")
        parts = ("expert_gate", "expert_up") if name == "expert_gate_up" else (name,)
        layers = [layer for layer, label in enumerate(sliced.labels) if label]
        ((label, _),) = sliced.groups.items()
        a = np.stack([found[layer, (group, parts[0])][0] for layer in layers])
        b = [np.concatenate([found[layer, (group, part)][1] for part in parts], axis=-2) for layer in layers]
        groups = {label: (jnp.asarray(a), jnp.asarray(np.stack(b) / adapter.config.scale))}
        pairs[at] = dataclasses.replace(sliced, groups=groups)
    return dataclasses.replace(adapter, pairs=pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.CASES)
def test_a_step(name: str, tmp_path: Path) -> None:
    case = families.CASES[name]
    with np.load(finetune_cases.HERE / f"family-{name}.npz") as file:
        want = dict(file)
    assert case.write(case.spec, tmp_path / "model") == str(want["digest"])
    model = fj.load(tmp_path / "model", dtype="float32")
    config = finetune.LoraConfig(rank=families.RANK, alpha=families.ALPHA)
    adapter = started(finetune.init(model, config, jax.random.key(0)), case, tmp_path / "adapter")
    examples = [finetune.Example(*row) for row in families.batch(case)]
    batch = jax.tree.map(lambda array: array[0], finetune.pack(examples, 104, case.spec.vocab))
    of = jax.jit(jax.value_and_grad(functools.partial(finetune.loss, config=model.config), argnums=1))
    loss, slope = of(model.params, adapter, batch)
    assert abs(float(loss) / want["loss"] - 1) <= 1e-4
    found, _ = named_factors(slope)
    assert sorted(found) == want["names"].tolist()
    for number, key in enumerate(sorted(found)):
        assert list(found[key].shape) == want["shapes"][number].tolist(), key
        error = np.abs(families.summary(case, key, found[key]) - want["gradients"][number])
        assert error.max() <= 1e-4 * want["gradients"][number, 0], key


def packed_cases() -> tuple[np.ndarray, ...]:
    """qkv, log_decay, beta and taps of sequences that end in chunks and at their ends, one of a single token, and padding."""
    draw = np.random.default_rng(0)
    ends, tokens, heads, keys = [50, 51, 128, 180], 200, 4, 2
    first = np.full(tokens, tokens, np.int32)
    for start, end in zip([0, *ends], ends, strict=False):
        first[start:end] = start
    channels = 2 * keys * 8 + heads * 6
    decay = -3 * np.abs(draw.normal(size=(tokens, heads)))
    arrays = draw.normal(size=(tokens, channels)), decay, draw.uniform(size=(tokens, heads)), draw.normal(size=(channels, 4))
    return *(array.astype(np.float32) for array in arrays), first


@pytest.mark.parametrize("tiled", [False, True])
def test_packed_delta_net(tiled: bool) -> None:
    """Against the contract token by token, each sequence alone."""
    qkv, decay, beta, taps, first = packed_cases()
    found = jax.jit(functools.partial(packed_delta_net, shape=(4, 8, 6), tiled=tiled))(qkv, decay, beta, taps, first)
    state = np.zeros((3, qkv.shape[1])), np.zeros((4, 8, 6))
    for start in np.unique(first[first < len(first)]):
        own = first == start
        want, *_ = delta_net(qkv[own], decay[own], beta[own], taps, *state, tiled=tiled)
        assert np.abs(np.asarray(found)[own] - want).max() <= 2e-6 * np.abs(want).max()


def test_derivative_of_the_packed_delta_net() -> None:
    """Against differences of the contract in float64, along a random direction in which each argument counts."""
    *given, first = packed_cases()
    draw, starts = np.random.default_rng(1), np.unique(first[first < len(first)])
    weight = draw.normal(size=(len(first), 4, 6)) * (first < len(first))[:, None, None]

    def exact(qkv, decay, beta, taps) -> float:
        total = 0.0
        for start in starts:
            own = first == start
            y, *_ = delta_net(qkv[own], decay[own], beta[own], taps, np.zeros((3, qkv.shape[1])), np.zeros((4, 8, 6)))
            total += (y * weight[own]).sum()
        return total

    of = jax.grad(lambda *x: (packed_delta_net(*x, first, (4, 8, 6)) * weight).sum(), argnums=(0, 1, 2, 3))
    slopes = jax.jit(of)(*given)
    along = [draw.normal(size=slope.shape) * np.linalg.norm(slopes[0]) / np.linalg.norm(slope) for slope in slopes]
    up, down = ([array + sign * 1e-6 * step for array, step in zip(given, along, strict=True)] for sign in (1, -1))
    want = (exact(*up) - exact(*down)) / 2e-6
    terms = [float((np.asarray(slope, np.float64) * step).sum()) for slope, step in zip(slopes, along, strict=True)]
    assert abs(sum(terms) - want) <= 1e-4 * np.linalg.norm(terms), (terms, want)
