"""The parts of the loss against plain formulas, and the loss itself: packing, masking, differences, and PEFT's numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from ferrum_jax.finetune.lora import LoraAdapter
from pallas_kernels import cross_entropy as losses
from pallas_kernels import dispatch
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.grouped_matmul import Pair, grouped_term
from pallas_kernels.segment_attention import segment_attention
from support.directories import MOE, write


def normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.float32)


def close(found, want, bound: float = 1e-5) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape and np.abs(one - other).max() <= bound * max(1.0, np.abs(other).max())


# ---- parts


def plain_attention(q, k, v, first, scale, window, sinks):
    """Softmax over all tokens, those that are not seen masked."""
    group, place = q.shape[1] // k.shape[1], jnp.arange(q.shape[0])
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    seen = (place[None] >= first[:, None]) & (place[None] <= place[:, None])
    seen &= (place[None] > place[:, None] - window) if window else True
    scores = jnp.where(seen, jnp.einsum("qhd,khd->hqk", q, k) * scale, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=-1)
    weights = jax.nn.softmax(jnp.where(seen.any(1)[:, None], scores, 0.0) if sinks is None else scores, axis=-1)
    y = jnp.einsum("hqk,khd->qhd", weights[..., : len(place)], v)
    return jnp.where(seen.any(1)[:, None, None], y, 0.0)


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (40, True)])
def test_attention_of_segments(window: int, sinks: bool) -> None:
    """Three tiles, sequences that begin and end inside them, one of a single token, and padding."""
    ends = [130, 131, 190, 300]
    tokens, first = 310, np.full(310, 310)
    for start, end in zip([0, *ends], ends, strict=False):
        first[start:end] = start
    first = jnp.asarray(first)
    q, k, v, weight = normal(0, tokens, 4, 16), normal(1, tokens, 2, 16), normal(2, tokens, 2, 8), normal(3, tokens, 4, 8)
    added = normal(4, 4) if sinks else None

    def of(function, *arguments):
        return jax.jit(jax.value_and_grad(lambda *x: (function(*x, *arguments) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)

    close(of(segment_attention, first, 0.25, window, added), of(plain_attention, first, 0.25, window, added), 2e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy_by_tiles(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three tiles repeats ids of the one before, and a target is among them."""
    monkeypatch.setattr(losses, "_NUMBERS", 128 * 24)
    hidden, matrix = normal(0, 6, 24), normal(1, 300, 24)
    targets = jnp.asarray([0, 299, 200, -1, 256, 127])

    def plain(hidden):
        logits = hidden @ matrix.T
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        found = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
        return jnp.where(targets >= 0, found, 0.0)

    tiled = functools.partial(losses.cross_entropy, targets=targets, matrix=Matrix.of(matrix, "F32"), softcap=softcap)

    def of(function):
        squared = jax.value_and_grad(lambda h: (function(h) ** 2).sum())
        return jax.jit(lambda h: (function(h), squared(h)))(hidden)

    close(of(tiled), of(plain), 2e-5)


def test_pairs_of_experts() -> None:
    """Groups of several tiles, of one row and of none, and rows of no expert."""
    sizes = jnp.asarray([40, 0, 1, 20])
    expert = jnp.repeat(jnp.arange(4), sizes, total_repeat_length=61)
    x, a, b, weight = normal(0, 64, 12), normal(1, 4, 3, 12), normal(2, 4, 7, 3), normal(3, 64, 7)

    def plain(x, a, b):
        y = 2.0 * jnp.einsum("mk,mrk,mnr->mn", x[:61], a[expert], b[expert])
        return (jnp.pad(y, ((0, 3), (0, 0))) * weight).sum()

    def grouped(x, a, b):
        return (grouped_term(x, sizes, Pair(a, b, 2.0), jnp.arange(64), dispatch.target()) * weight).sum()

    close(*(jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, a, b) for f in (grouped, plain)))


# ---- the loss


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> fj.Model:
    """Two layers: a mixture, and a dense one; weights in blocks."""
    spec = dataclasses.replace(MOE, name="two", layers=2, dense=(1,), dtype="F32", config={"mlp_only_layers": [1]})
    return fj.load(write(spec, tmp_path_factory.mktemp("model") / "two"), dtype="float32", quantize="q8_0")


@pytest.fixture(scope="module")
def adapter(model: fj.Model) -> LoraAdapter:
    """With a B that is not zero."""
    made = finetune.init(model, finetune.LoraConfig(rank=3), jax.random.key(1))
    return jax.tree.map(lambda array: array + 0.05 * normal(array.size, *array.shape), made)


@pytest.fixture(scope="module")
def value_and_grad(model: fj.Model):
    """Compiled once for each shape of a batch: the loss and its gradient."""
    function = functools.partial(finetune.loss, config=model.config)
    compiled = jax.jit(jax.value_and_grad(function, argnums=1))
    return lambda adapter, batch: compiled(model.params, adapter, batch)


def examples_of(model: fj.Model) -> list[finetune.Example]:
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, model.config.vocab_size, size).tolist() for size in (9, 14, 5)]
    learned = None, [i % 3 > 0 for i in range(14)], None
    return [finetune.Example(*pair) for pair in zip(tokens, learned, strict=True)]


def packed(model: fj.Model, examples: list[finetune.Example], length: int = 32) -> finetune.PackedBatch:
    batch = finetune.pack(examples, length, model.config.vocab_size)
    assert len(batch.tokens) == 1
    return jax.tree.map(lambda array: array[0], batch)


def test_zero_adapter_gives_the_models_own_loss(model: fj.Model, value_and_grad) -> None:
    examples = examples_of(model)
    adapter = finetune.init(model, finetune.LoraConfig(rank=3), jax.random.key(1))
    found, slope = value_and_grad(adapter, packed(model, examples))
    logits = model.logits([example.tokens for example in examples])
    scores = [
        -jax.nn.log_softmax(row[:-1])[np.arange(len(row) - 1), example.tokens[1:]][example.targets[1:]]
        for row, example in zip(logits, examples, strict=True)
    ]
    assert abs(float(found) - np.concatenate(scores).mean()) <= 1e-5
    for sliced in slope.pairs.values():
        for a, b in sliced.groups.values():  # B is zero, so A cannot matter yet
            assert not np.asarray(a).any() and np.asarray(b).any()


def test_a_pack_has_the_sum_of_its_sequences(model: fj.Model, adapter: LoraAdapter, value_and_grad) -> None:
    """Loss and gradient; so no sequence sees another one, and padding adds nothing."""
    examples = examples_of(model)
    counts = [int(example.targets.sum()) for example in examples]
    together = value_and_grad(adapter, packed(model, examples))
    apart = [value_and_grad(adapter, packed(model, [example])) for example in examples]
    mean = jax.tree.map(lambda *parts: sum(c * p for c, p in zip(counts, parts, strict=True)) / sum(counts), *apart)
    close(together, mean, 2e-5)


def test_differences(model: fj.Model, adapter: LoraAdapter, value_and_grad) -> None:
    """Along random directions, one for each matrix, with an adapter that changes the model by about as much as its weights."""
    batch = packed(model, examples_of(model))
    _, slope = value_and_grad(adapter, batch)
    for path, sliced in adapter.pairs.items():
        direction = jax.tree.map(lambda array: normal(array.size + 1, *array.shape), sliced)
        step = 1e-2 / float(np.sqrt(sum((np.asarray(d) ** 2).sum() for d in jax.tree.leaves(direction))))

        def moved(sign: float, path=path, sliced=sliced, direction=direction, step=step) -> float:
            new = jax.tree.map(lambda array, along: array + sign * step * along, sliced, direction)
            return float(value_and_grad(dataclasses.replace(adapter, pairs=adapter.pairs | {path: new}), batch)[0])

        expected = (moved(1) - moved(-1)) / (2 * step)
        pairs = zip(jax.tree.leaves(slope.pairs[path]), jax.tree.leaves(direction), strict=True)
        found = sum(float((np.asarray(g) * np.asarray(d)).sum()) for g, d in pairs)
        assert abs(found - expected) <= 0.02 * abs(expected) + 2e-5 / step * 1e-2, path


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, r"LoraConfig\.rank must be a positive integer, not 0"),
        ({"alpha": float("nan")}, r"LoraConfig\.alpha must be a positive number"),
        ({"targets": ("attention", "router")}, r"LoraConfig\.targets has 'router'; the targets are attention, dense, experts"),
        ({"targets": ()}, r"LoraConfig\.targets is empty"),
        ({"dora": True}, r"LoraConfig\.dora: DoRA is not supported; LoRA and rsLoRA"),
        ({"dtype": "int8"}, r"LoraConfig\.dtype 'int8' is not supported"),
    ],
)
def test_wrong_configurations(fields, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finetune.LoraConfig(**fields)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (finetune.Example([1] * 9), "example 1: 9 tokens do not fit into a pack of 8"),
        (finetune.Example([1, 2], [True, False]), "example 1: has no target"),
        (finetune.Example([1, 2], [True]), "example 1: 2 tokens and 1 values of learned"),
        (finetune.Example([1, 50]), "example 1: token ids must be integers below the vocabulary's 50"),
        (finetune.Example([1, -1]), "example 1: token ids must be integers"),
    ],
)
def test_wrong_examples(example, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finetune.pack([finetune.Example([1, 2]), example], 8, 50)
