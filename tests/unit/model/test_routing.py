"""The recorded choice of experts: compared with transformers' routers, the one that the model computes with, and free if not
requested."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import functional as F
from ferrum_jax.models import layers
from ferrum_jax.quantized import QuantizedTensor, linear
from pallas_kernels import dispatch
from pallas_kernels.routing import Router, route, xla
from support.compiler import needs_compiler
from support.goldens import directory_cases, tiny_directories, tiny_models
from support.random_models import DENSE, MOE, tiny_params
from support.routing import chosen
from support.tiny_gguf import write_tiny_llama

CASES = {spec.name: spec for spec in directory_cases.CASES}
TOKENS = np.random.default_rng(3).integers(0, 320, 20).astype(np.int32)
NATIVE = dataclasses.replace(MOE, dtype="int8", num_experts=9, norm_topk_prob=False, expert_weights_scale=2.5)


@functools.cache
def params_of(config):
    return tiny_params(config, lambda name, layer: "F32" if name == "router" else "Q8_0")


@functools.cache
def loaded(folder, name):
    digest = tiny_directories.write(CASES[name], folder / name)
    return digest, fj.load(folder / name, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder, "qwen3moe-f32")[1]


def batch_of(tokens, padding=2):
    """A step over one sequence from its beginning, the last rows padding."""
    count = len(tokens)
    fields = (
        [*tokens, *[0] * padding],
        [*range(count), *[0] * padding],
        [*range(count), *[-1] * padding],
        [0, count],
        [count],
        np.arange(2)[None],
        [count - 1],
    )
    return F.RaggedBatch(*(np.asarray(field, np.int32) for field in fields))


def cache_of(config, dtype="float32"):
    return F.new_cache(config, num_pages=2, page_size=16, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3moe-mixed-bf16", "qwen3moe-f32", "mixtral-bf16"])
def test_routing_is_that_of_transformers(folder, name):
    digest, model = loaded(folder, name)
    prompt = tiny_models.prompts(CASES[name].vocab)[1]
    with np.load(directory_cases.HERE / "routing.npz") as file:
        assert str(file[f"{name} digest"]) == digest, "not the files that the goldens were made from"
        ids, weights = file[f"{name} ids"], file[f"{name} weights"]
    found = model.trace_routing(prompt)
    assert found.tokens.tolist() == prompt and found.num_experts == 8
    assert found.layers.tolist() == [layer for layer in range(CASES[name].layers) if layer not in CASES[name].dense]
    assert (found.expert_ids.dtype, found.expert_weights.dtype) == (np.int32, np.float32)
    assert (found.expert_ids == ids).all()
    assert np.abs(found.expert_weights - weights).max() <= 1e-4
    normalized = np.abs(found.expert_weights.sum(axis=-1) - 1).max() <= 1e-6
    assert normalized == (name != "qwen3moe-mixed-bf16")


def test_a_token_does_not_see_what_follows(model):
    prompt = tiny_models.prompts(320)[-1]
    whole, begin = model.trace_routing(prompt), model.trace_routing(prompt[:17])
    assert whole.expert_ids.shape == (2, 130, 3) and (whole.expert_ids < 8).all()
    assert np.array_equal(whole.expert_ids[:, :17], begin.expert_ids)
    assert np.array_equal(whole.expert_weights[:, :17], begin.expert_weights)


def test_the_old_names_of_a_routing_warn(model):
    found = model.trace_routing([1, 2, 3])
    for old in ("ids", "weights"):
        with pytest.warns(DeprecationWarning, match=f"Routing.{old} is called expert_{old} now"):
            assert getattr(found, old) is getattr(found, f"expert_{old}")


@pytest.mark.slow
def test_texts_of_several_chunks(model, monkeypatch):
    prompt = tiny_models.prompts(320)[-1]
    whole = model.trace_routing(prompt)
    monkeypatch.setattr(F, "CHUNK", 48)
    for one, other in zip(whole, model.trace_routing(prompt), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_what_is_recorded_is_what_is_computed_with(monkeypatch):
    """With a replaced router: its choice is recorded, and the experts are summed with it."""
    batch, params = batch_of(TOKENS), params_of(MOE)
    before, _ = F.forward(params, cache_of(MOE), batch, config=MOE)

    def by_position(logits, live, router, bias, *, implementation):
        _, weights = xla.route(logits, live, bias, router)
        return jnp.broadcast_to(jnp.arange(router.top_k), weights.shape), weights[:, ::-1]

    monkeypatch.setattr(layers, "route", by_position)
    (ids, weights), _ = F.routing(params, cache_of(MOE), batch, config=MOE)
    assert (np.asarray(ids) == np.arange(4)).all() and (np.diff(np.asarray(weights)) >= 0).all()
    after, _ = F.forward(params, cache_of(MOE), batch, config=MOE)
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("config", [MOE, dataclasses.replace(MOE, dtype="bfloat16"), NATIVE], ids=lambda config: config.dtype)
def test_inside_a_program_of_ones_own(config):
    """Jitted with more around it; padding has no experts; the cache is that of `forward`."""
    batch, params = batch_of(TOKENS), params_of(config)

    @functools.partial(jax.jit, donate_argnums=1, static_argnames="config")
    def both(params, cache, batch, config):
        chosen, cache = F.routing(params, cache, batch, config=config)
        return F.forward(params, cache, batch, config=config), chosen

    (logits, cache), (ids, weights) = both(params, cache_of(config), batch, config)
    plain, kept = jax.jit(functools.partial(F.forward, config=config))(params, cache_of(config), batch)
    assert np.array_equal(plain, logits) and all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(cache)))
    ids, weights = np.asarray(ids), np.asarray(weights)
    assert ids.shape == weights.shape == (3, 22, 4) and (ids[:, 20:] == config.num_experts).all()
    chosen = ids[:, :20]
    assert (chosen >= 0).all() and (chosen < config.num_experts).all()
    assert all(len(set(row)) == 4 for row in chosen.reshape(-1, 4).tolist())
    assert (np.diff(weights[:, :20]) <= 0).all() and (weights[:, :20] > 0).all()
    total = weights[:, :20].sum(axis=-1)
    assert np.abs(total - 1).max() <= 1e-6 if config.norm_topk_prob else (total < 2.5).all()


@needs_compiler
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_all_layers_in_one_call_record_too(monkeypatch, kv):
    """Both quantize activations, so weights may differ a little, and the choice may differ in a near tie."""
    from ferrum_jax.models import decoder

    batch, params = batch_of(TOKENS), params_of(NATIVE)
    with dispatch.record() as choices:
        (ids, weights), _ = F.routing(params, cache_of(NATIVE, kv), batch, config=NATIVE)
    assert ("decoder_layers", "native") in {(choice.operation, choice.backend) for choice in choices}
    monkeypatch.setattr(decoder, "backend_for", lambda *_: None)
    (expected, theirs), _ = F.routing(params, cache_of(NATIVE, kv), batch, config=NATIVE)
    same = np.asarray(ids) == np.asarray(expected)
    assert same.mean() > 0.95
    read = same & (np.asarray(expected) < NATIVE.num_experts)  # the weights of padding mean nothing
    assert np.abs(np.asarray(weights) - np.asarray(theirs))[read].max() <= 0.02 * 2.5


def test_nothing_is_recorded_unasked(monkeypatch):
    """The step's program is the same as without a recorder."""

    def program():
        step = jax.jit(functools.partial(F.forward, config=MOE), donate_argnums=1)
        return step.lower(params_of(MOE), cache_of(MOE), batch_of(TOKENS)).as_text()

    before = program()
    monkeypatch.setattr(layers.FeedForward, "sow", lambda *_: False)
    assert program() == before


def test_models_without_experts_are_refused(tmp_path):
    with pytest.raises(fj.UnsupportedModelError, match="architecture 'qwen3': this model has no experts"):
        F.routing({}, None, None, config=DENSE)
    model = fj.load(write_tiny_llama(tmp_path / "tiny.gguf"), dtype="float32")
    with pytest.raises(fj.UnsupportedModelError, match="architecture 'llama': this model has no experts"):
        model.trace_routing("abc")


def test_prompts_that_cannot_be(model):
    with pytest.raises(ValueError, match="empty prompt"):
        model.trace_routing("")
    with pytest.raises(ValueError, match="adapter 'x' is not loaded"):
        model.trace_routing("abc", adapter="x")


def with_experts(model, count):
    """The model with the same weights and another number of experts per token."""
    config = dataclasses.replace(model.config, experts_per_token=count)
    return fj.Model(config, model.params, model.tokenizer, model.device, model.kv_dtype, model.max_seq_len)


@pytest.mark.slow
def test_other_numbers_of_experts_per_token(model):
    """The first layer sees the same, so its choice grows by one; perplexity is that of the functional layer's logits."""
    prompt = tiny_models.prompts(320)[-1]
    found, chosen = [], []
    for count in range(1, 9):
        other = with_experts(model, count)
        found.append(other.perplexity(prompt))
        chosen.append(other.trace_routing(prompt).expert_ids[0])
        assert chosen[-1].shape == (130, count)
    assert all(np.array_equal(more[:, :-1], fewer) for fewer, more in itertools.pairwise(chosen))
    assert found[2] == model.perplexity(prompt) and len(set(found)) == 8
    config = dataclasses.replace(model.config, experts_per_token=1)
    tokens, lengths = np.asarray([prompt], np.int32), np.asarray([130], np.int32)
    cache = F.new_cache(config, num_pages=9, dtype="float32")
    hidden, _ = F.hidden_chunk(model.params, cache, tokens, lengths, 0, chunk=130, config=config)
    logprobs = F.logprobs_of(model.params, hidden[:-1], tokens[0, 1:], config=config)
    assert abs(np.exp(-np.asarray(logprobs).mean()) / found[0] - 1) <= 1e-5
    with pytest.raises(ValueError, match="top_k 9"):
        with_experts(model, 9).perplexity(prompt)


# ---- The router itself

ROUTERS = {
    "softmax": Router(4),
    "sums kept": Router(3, False, 2.5),
    "sigmoid": Router(4, True, 2.5, "sigmoid", 1e-20),
    "sum of two, V3": Router(4, True, 1.5, "sigmoid", 1e-20, groups=4, groups_used=2, group_best=2),
    "maximum, V2": Router(4, False, 16.0, groups=4, groups_used=2),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_choice_is_that_of_its_definition(name, biased):
    """Against NumPy in float64. The bias moves the choice and is no part of the weights, whose derivative is the scores'."""
    rng, router = np.random.default_rng(len(name)), ROUTERS[name]
    logits = rng.standard_normal((33, 16)).astype(np.float32)
    bias = (rng.standard_normal(16) / 4).astype(np.float32) if biased else None
    live = np.arange(33) != 5
    ids, weights = route(logits, live, router, bias)
    expected, wanted = chosen(logits, bias, router)
    assert np.array_equal(ids, np.where(live[:, None], expected, 16))
    assert not np.abs(np.asarray(weights) - wanted).max() > 1e-6 * router.scale
    way = rng.standard_normal(logits.shape)
    after, before = (chosen(logits + step * way, bias, router)[1] for step in (1e-6, -1e-6))
    slope = jax.grad(lambda logits: (route(logits, live, router, bias)[1] * wanted).sum())(jnp.asarray(logits))
    assert abs((slope * way).sum() - ((after - before) * wanted).sum() / 2e-6) <= 1e-3 * router.scale**2


def test_what_is_not_a_choice_is_refused():
    logits, live = np.zeros((2, 16), np.float32), np.ones(2, bool)
    for router in (Router(0), Router(17), Router(2, groups=3), Router(5, groups=4), Router(2, groups=8, group_best=3)):
        with pytest.raises(ValueError, match=r"top_k \d+ does not fit 16 experts"):
            route(logits, live, router)
    with pytest.raises(ValueError, match="and a bias do not fit"):
        route(logits, live, Router(2), np.zeros(8, np.float32))


@pytest.mark.parametrize(
    ("experts", "router"),
    [
        (16, Router(4)),
        (16, ROUTERS["sum of two, V3"]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((20, Router(3)), (128, Router(8)))),
    ],
)
def test_a_row_has_the_same_bits_in_any_number_of_rows(experts, router):
    """XLA gives a reduction over 4096 numbers or more to a library, with the exponential that follows."""
    rng = np.random.default_rng(experts)
    x = rng.standard_normal((512, 64)).astype(np.float32)
    matrix = QuantizedTensor.of(rng.standard_normal((experts, 64)).astype(np.float32) / 4, "F32")
    bias = rng.standard_normal(experts).astype(np.float32) / 4

    @jax.jit
    def routed(x):
        return route(linear(x, matrix), np.ones(x.shape[0], bool), router, bias)

    ids, weights = map(np.asarray, routed(x))
    np.testing.assert_allclose(weights.sum(-1), router.scale, rtol=1e-6)
    for rows in (2, 31, 32, 204, 205, 255, 256):
        some_ids, some_weights = map(np.asarray, routed(x[:rows]))
        assert np.array_equal(some_ids, ids[:rows])
        assert np.array_equal(some_weights.view(np.uint32), weights[:rows].view(np.uint32)), rows
