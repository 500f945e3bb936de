"""Layers that differ in windows, rotations, heads and feed-forward against plain NumPy in float64; each distinct body once."""

import collections
import dataclasses
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import functional as F
from ferrum_jax.config import Attention, Dense, LayerSpec, Mixture, ModelConfig, Rope, RopeScaling
from ferrum_jax.distributed import Placement
from ferrum_jax.families.qwen3 import QWEN3
from ferrum_jax.files.metadata import plain
from ferrum_jax.models import decoder
from ferrum_jax.models.rope import rope_frequencies
from ferrum_jax.models.scan import layer_segments
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.state import page_kinds
from ferrum_jax.weights import orbax
from ferrum_jax.weights.gguf import open_gguf
from ferrum_jax.weights.names import parameters as parameter_table
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.stream import read_parameters

HIDDEN, VOCAB = 32, 40
forward = jax.jit(F.forward, static_argnames="config")
WIDE, TURNED = Rope(1e4, 16), Rope(1e6, 8, RopeScaling("linear", 2.0))
SLIDING = LayerSpec(Attention(4, 2, 16, WIDE, window=5), Dense(48))
MIXED = LayerSpec(Attention(4, 2, 16, WIDE, window=5), Mixture(5, 2, 24, normalize=True, scale=1.5))
LAYERS = (SLIDING, SLIDING, LayerSpec(Attention(8, 2, 16, TURNED), Dense(64)), MIXED, MIXED)
LAYERS += (LayerSpec(Attention(2, 2, 16, WIDE, window=9), Mixture(3, 1, 24)), LayerSpec(Attention(3, 1, 32, TURNED), Dense(48)))


def configure(layers) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3", hidden_size=HIDDEN, vocab_size=VOCAB, context_length=64, rms_norm_eps=1e-6, layers=layers
    )


def matrices(spec: LayerSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The parameters of one layer, float64, by the last part of their path."""
    attention, feed_forward = spec.mixer, spec.feed_forward
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    shapes = {"query": (queries, HIDDEN), "key": (keys, HIDDEN), "value": (keys, HIDDEN), "output": (HIDDEN, queries)}
    if isinstance(feed_forward, Mixture):
        inner = feed_forward.num_experts, feed_forward.width
        shapes |= {"router": (inner[0], HIDDEN), "expert_gate": (*inner, HIDDEN), "expert_up": (*inner, HIDDEN)}
        shapes |= {"expert_down": (inner[0], HIDDEN, inner[1])}
    else:
        shapes |= {
            "gate": (feed_forward.width, HIDDEN),
            "up": (feed_forward.width, HIDDEN),
            "down": (HIDDEN, feed_forward.width),
        }
    made = {name: rng.normal(0, 1.5 * shape[-1] ** -0.5, shape) for name, shape in shapes.items()}
    norms = {
        "attention_norm": HIDDEN,
        "feed_forward_norm": HIDDEN,
        "query_norm": attention.head_dim,
        "key_norm": attention.head_dim,
    }
    made |= {name: rng.uniform(0.5, 1.5, size) for name, size in norms.items()}
    return {name: array.astype(np.float32).astype(np.float64) for name, array in made.items()}


def parameters(layers: list[dict[str, np.ndarray]], embedding: np.ndarray) -> dict:
    """The same in the model's form: those of one shape in a stack."""
    tree: dict = {"attention": {}, "feed_forward": {}}
    for name in sorted({name for layer in layers for name in layer}):
        layout = tuple(str(layer[name].shape) if name in layer else "" for layer in layers)
        stacks = {
            kind: QuantizedTensor.of(
                jnp.asarray([layer[name] for layer, own in zip(layers, layout, strict=True) if own == kind], jnp.float32),
                "F32",
                vectors=name.endswith("norm"),
            )
            for kind in set(layout) - {""}
        }
        group = tree["attention"] if name.split("_")[0] in ("query", "key", "value", "output") else tree["feed_forward"]
        (tree if name in ("attention_norm", "feed_forward_norm") else group)[name] = LayerStack(stacks, layout)
    whole = QuantizedTensor.of(jnp.asarray(embedding, jnp.float32), "F32")
    return {"embedding": whole, "final_norm": jnp.ones(HIDDEN), "layers": tree}


def norm(x: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    hidden = x @ gate.T
    return (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T


def attend(x: np.ndarray, layer: dict[str, np.ndarray], spec: Attention) -> np.ndarray:
    length, half = len(x), spec.rope.dim // 2
    factor = spec.rope.scaling.factor if spec.rope.scaling else 1.0
    angles = np.arange(length)[:, None, None] * spec.rope.theta ** (-np.arange(half) / half) / factor

    def heads(name: str) -> np.ndarray:  # [length, heads, head_dim]
        return (x @ layer[name].T).reshape(length, -1, spec.head_dim)

    def turned(values: np.ndarray) -> np.ndarray:
        a, b, rest = values[..., :half], values[..., half : 2 * half], values[..., 2 * half :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1)

    q, k = (turned(norm(heads(name), layer[f"{name}_norm"])) for name in ("query", "key"))
    k, v = (np.repeat(values, spec.num_heads // spec.num_kv_heads, axis=1) for values in (k, heads("value")))
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (spec.window or length))
    scores = np.where(seen[None], np.einsum("qhd,khd->hqk", q, k) / np.sqrt(spec.head_dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(length, -1) @ layer["output"].T


def feed(x: np.ndarray, layer: dict[str, np.ndarray], spec: Dense | Mixture) -> tuple[np.ndarray, np.ndarray | None]:
    """The result, and for a mixture the experts of each token."""
    if isinstance(spec, Dense):
        return swiglu(x, layer["gate"], layer["up"], layer["down"]), None
    odds = np.exp(x @ layer["router"].T)
    odds /= odds.sum(-1, keepdims=True)
    ids = np.argsort(-odds, axis=-1)[:, : spec.experts_per_token]
    weights = np.take_along_axis(odds, ids, -1)
    weights = weights / (weights.sum(-1, keepdims=True) if spec.normalize else 1) * spec.scale
    y = np.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(ids, weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            y[token] += share * swiglu(x[token], *(layer[f"expert_{name}"][expert] for name in ("gate", "up", "down")))
    return y, ids


def reference(config: ModelConfig, layers: list[dict], embedding: np.ndarray, tokens: np.ndarray):
    """Logits float64 [length, vocab], and the experts of each token in the mixtures."""
    x, routed = embedding[tokens], []
    for spec, layer in zip(config.layers, layers, strict=True):
        x = x + attend(norm(x, layer["attention_norm"]), layer, spec.mixer)
        y, ids = feed(norm(x, layer["feed_forward_norm"]), layer, spec.feed_forward)
        x = x + y
        routed += [] if ids is None else [ids]
    return norm(x, 1.0) @ embedding.T, routed


def batch(tokens: np.ndarray, first: int, last: int) -> F.RaggedBatch:
    """Tokens first .. last - 1 of one text, whose pages are in order."""
    place, numbers = np.arange(first, last, dtype=np.int32), np.arange(-(-len(tokens) // 16), dtype=np.int32)
    starts, lengths = np.array([0, last - first], np.int32), np.array([last], np.int32)
    return F.RaggedBatch(
        tokens[first:last], place, place, starts, lengths, numbers[None], np.arange(last - first, dtype=np.int32)
    )


@pytest.mark.slow
def test_every_layer_works_from_its_own_spec() -> None:
    rng = np.random.default_rng(3)
    config = configure(LAYERS)
    layers = [matrices(spec, rng) for spec in LAYERS]
    embedding = rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32).astype(np.float64)
    params, tokens = parameters(layers, embedding), rng.integers(0, VOCAB, 40).astype(np.int32)
    wanted, _ = reference(config, layers, embedding, tokens)
    cache, found = F.new_cache(config, num_pages=3), []
    for first, last in ((0, 17), (17, 18), (18, 40)):
        logits, cache = forward(params, cache, batch(tokens, first, last), config=config)
        found.append(np.asarray(logits))
    error = np.abs(np.concatenate(found) - wanted).max()
    assert not error > 1e-3 and wanted.std() > 1
    for changed in ({"sliding_window": 0}, {"rope_theta": 1e4}, {"rope_scaling": None}, {"expert_weights_scale": 1.0}):
        other = dataclasses.replace(config, **changed)
        logits, _ = forward(params, F.new_cache(other, num_pages=3), batch(tokens, 0, 40), config=other)
        assert np.abs(np.asarray(logits) - wanted).max() > 0.01, changed


@pytest.mark.slow
def test_every_kind_of_layer_has_pages_of_its_own() -> None:
    """Pages and slots for each pool, one after the other: the same bits as with the same pages in all of them."""
    rng = np.random.default_rng(5)
    config = configure(LAYERS)
    params = parameters([matrices(spec, rng) for spec in LAYERS], rng.normal(0, 1, (VOCAB, HIDDEN)))
    tokens = rng.integers(0, VOCAB, 40).astype(np.int32)
    whole = batch(tokens, 0, 40)
    table = np.stack([rng.permutation(5)[:3] for _ in page_kinds(config)]).astype(np.int32)
    place = whole.positions
    apart = whole._replace(page_table=table, slots=(table[:, place // 16] * 16 + place % 16).reshape(-1))
    assert len(table) == 4
    results = [forward(params, F.new_cache(config, num_pages=5), each, config=config)[0] for each in (whole, apart)]
    assert np.array_equal(*map(np.asarray, results))


@pytest.mark.slow
def test_parameters_of_several_shapes_are_saved_and_read(tmp_path: Path) -> None:
    """A parameter has a stack for each shape, in memory and in an Orbax checkpoint."""
    rng = np.random.default_rng(6)
    config = dataclasses.replace(configure(LAYERS), architecture="qwen3moe")
    params = parameters([matrices(spec, rng) for spec in LAYERS], rng.normal(0, 1, (VOCAB, HIDDEN)))
    orbax.save(tmp_path / "model", config, {}, params)
    with open_model(tmp_path / "model") as source:
        assert source.config() == config
        again = read_parameters(source, parameter_table(source, config), Placement.of())
    query = again["layers"]["attention"]["query"]
    assert {kind: stack.shape for kind, stack in query.stacks.items()} == {
        "F32": (4, 64, 32), "F32 [128, 32]": (1, 128, 32), "F32 [32, 32]": (1, 32, 32), "F32 [96, 32]": (1, 96, 32)
    }  # fmt: skip
    tokens = rng.integers(0, VOCAB, 20).astype(np.int32)
    results = [
        forward(each, F.new_cache(config, num_pages=2), batch(tokens, 0, 20), config=config)[0] for each in (params, again)
    ]
    assert np.array_equal(*map(np.asarray, results))


def write_gguf(path: Path, config: ModelConfig, layers: list[dict[str, np.ndarray]], embedding: np.ndarray) -> None:
    """With gguf-py: of heads and widths an array, as converters write them."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count([mixer.num_heads for mixer in config.attentions])
    writer.add_head_count_kv([mixer.num_kv_heads for mixer in config.attentions])
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length([spec.feed_forward.width for spec in config.layers])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    names = {tensor.path[-1]: tensor.name for tensor in QWEN3.tensors.layer}
    tensors = {f"blk.{i}.{names[name]}": array for i, layer in enumerate(layers) for name, array in layer.items()}
    tensors |= {"token_embd.weight": embedding, "output_norm.weight": np.ones(HIDDEN)}
    for name, array in tensors.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_has_heads_and_widths_for_each_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    heads, kv_heads, widths = (4, 8, 2, 4), (2, 2, 1, 2), (48, 64, 48, 96)
    specs = [LayerSpec(Attention(*n, 16, WIDE), Dense(width)) for *n, width in zip(heads, kv_heads, widths, strict=True)]
    config = dataclasses.replace(configure(specs), rms_norm_eps=float(np.float32(1e-6)))  # as a file has it
    layers = [matrices(spec, rng) for spec in config.layers]
    embedding = rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32).astype(np.float64)
    write_gguf(tmp_path / "model.gguf", config, layers, embedding)
    with open_gguf(tmp_path / "model.gguf") as source:
        assert source.config() == config
        params = read_parameters(source, parameter_table(source, config), Placement.of())
        keys = plain(QWEN3.to_gguf(config, "here"))
        assert QWEN3.read_gguf(keys, source.tensors, "here") == config
    tokens = rng.integers(0, VOCAB, 20).astype(np.int32)
    logits, _ = forward(params, F.new_cache(config, num_pages=2), batch(tokens, 0, 20), config=config)
    wanted, _ = reference(config, layers, embedding, tokens)
    assert not np.abs(np.asarray(logits) - wanted).max() > 1e-3 and wanted.std() > 1


@pytest.mark.slow
def test_routing_is_that_of_the_layers_with_experts() -> None:
    rng = np.random.default_rng(4)
    config = configure((SLIDING, MIXED, SLIDING, MIXED))
    layers = [matrices(spec, rng) for spec in config.layers]
    embedding = rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32).astype(np.float64)
    tokens = rng.integers(0, VOCAB, 12).astype(np.int32)
    (ids, _), _ = F.routing(
        parameters(layers, embedding), F.new_cache(config, num_pages=1), batch(tokens, 0, 12), config=config
    )
    assert config.expert_layers == (1, 3)
    assert np.array_equal(np.asarray(ids), reference(config, layers, embedding, tokens)[1])


def test_a_body_is_traced_once_a_distinct_spec(monkeypatch) -> None:
    """And plans and angles are made once for each kind of them."""
    full = dataclasses.replace(SLIDING, mixer=dataclasses.replace(SLIDING.mixer, window=0))
    config = configure((SLIDING, SLIDING, full) * 8 + (full,) * 6)
    layers = [matrices(spec, np.random.default_rng(0)) for spec in config.layers]
    params = parameters(layers, np.zeros((VOCAB, HIDDEN)))
    assert layer_segments(params["layers"], config.layers) == ((0, (2, 1), 8), (24, (1,), 6))
    calls = collections.Counter()

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.update([name]) or real(*args, **kwargs))

    for name in ("Block", "make_metadata", "rope_angles"):
        counted(decoder, name)
    cache = F.new_cache(config, num_pages=1)
    jax.jit(lambda *args: F.forward(*args, config=config)).lower(params, cache, batch(np.zeros(12, np.int32), 0, 12))
    assert calls == {"Block": 3, "make_metadata": 2, "rope_angles": 1}


def test_a_state_of_another_model_is_refused() -> None:
    config = configure(LAYERS)
    alike = configure(LAYERS[:2])
    with pytest.raises(
        ValueError, match="the state has 1 pools of pages, but the model's layers need 4: make it with new_cache"
    ):
        forward({}, F.new_cache(alike, num_pages=3), batch(np.zeros(2, np.int32), 0, 2), config=config)


def test_frequencies_are_of_the_rotation() -> None:
    assert np.array_equal(rope_frequencies(TURNED), rope_frequencies(Rope(1e6, 8)) / 2)
