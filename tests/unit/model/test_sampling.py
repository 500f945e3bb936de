"""Sampling against an oracle that sorts: NumPy, float64, one row at a time, no code shared with the package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from ferrum_jax import sampling as module
from ferrum_jax.sampling import Sampling, SamplingParams, filtered_logits, is_end, sample, token_logprobs

KEY = jax.random.key(7)
run = jax.jit(sample)
run_filter = jax.jit(filtered_logits)


def batch(params, limit, seeds=None, **kwargs):
    seeds = range(len(params)) if seeds is None else seeds
    return Sampling.from_params(params, eos_ids=[2], vocab_limit=limit, default_seeds=list(seeds), **kwargs)


def nothing_seen(logits):
    return np.zeros(np.shape(logits), bool)


def oracle_prefix(logits, p, seen, limit, slack):
    """The kept ids, best first, if the thresholds of top-p and min-p are `slack` (relative) higher."""
    x = np.array(logits, np.float32)
    penalty = np.float32(p.repetition_penalty)
    for i in np.flatnonzero(seen):
        x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
    x[limit:] = -np.inf
    order = np.argsort(-x.astype(np.float64), kind="stable")
    order = order[x[order] > -np.inf]
    weights = np.exp((x[order].astype(np.float64) - x.max()) / p.temperature)
    keep = max(1, int(np.sum(weights >= p.min_p * (1 + slack))))
    if p.top_k:
        keep = min(keep, p.top_k)
    if p.top_p < 1:
        mass = np.cumsum(weights[:keep])
        keep = min(keep, int(np.sum(mass < p.top_p * (1 + slack) * mass[-1])) + 1)
    return order[:keep], x


def check_filter(logits, params, seen, limit, result):
    """Every row keeps the oracle's prefix; if a threshold is within 1e-5 of a boundary, one on either side of it."""
    for row, p in enumerate(params):
        shorter, x = oracle_prefix(logits[row], p, seen[row], limit, -1e-5)
        longer, _ = oracle_prefix(logits[row], p, seen[row], limit, 1e-5)
        least, most = sorted((shorter, longer), key=len)
        if p.min_p:  # min-p grows shorter as it rises, top-p longer
            least = least[: min(len(least), len(oracle_prefix(logits[row], p, seen[row], limit, 0)[0]))]
        kept = np.flatnonzero(result[row] > -np.inf)
        assert len(least) <= len(kept) <= max(len(most), len(least)), (row, p, len(kept))
        order = np.argsort(-x.astype(np.float64), kind="stable")
        assert set(kept) == set(order[: len(kept)]), (row, p)
        expected = (x[kept].astype(np.float64) - x.max()) / p.temperature
        np.testing.assert_allclose(result[row][kept], expected, rtol=1e-5, atol=1e-6)


# ---- parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", True), ("max_tokens", 1.5), ("max_tokens", None), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "1"), ("temperature", True),
        ("top_k", -2), ("top_k", 1.0), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")),
        ("top_p", None), ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan")), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")), ("repetition_penalty", float("nan")), ("seed", 1.0), ("seed", True),
        ("seed", "x"), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", None), ("stop", 3),
        ("ignore_eos", 1), ("ignore_eos", None), ("logprobs", -1), ("logprobs", 65), ("logprobs", True),
        ("logprobs", 1.0),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} must be .*; got "):
        SamplingParams(**{field: value})


def test_parameters_are_normalized():
    p = SamplingParams(top_k=-1, stop="end", seed=2**32 + 5, temperature=1, max_tokens=np.int64(3), min_p=np.float32(0.5))
    assert (p.top_k, p.stop, p.seed, p.temperature, p.max_tokens, p.min_p) == (0, ("end",), 5, 1.0, 3, 0.5)
    assert type(p.temperature) is float and type(p.max_tokens) is int and type(p.min_p) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams(seed=-2).seed == 2**32 - 2
    assert SamplingParams(logprobs=0).logprobs == 0 and SamplingParams(logprobs=64).logprobs == 64
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop=("a",)))
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 1
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "seed": None, "stop": (), "ignore_eos": False, "logprobs": None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logit_bias": None, "min_tokens": 0, "bad_words": (), "n": 1, "prompt_logprobs": None,
        "special_tokens": (), "structured": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5), ("frequency_penalty", -3), ("frequency_penalty", float("nan")), ("min_tokens", -1),
        ("min_tokens", 17), ("n", 0), ("n", True), ("n", 129), ("bad_words", [""]), ("bad_words", 3),
        ("special_tokens", [-1]), ("special_tokens", ["a"]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: float("inf")}), ("logit_bias", {5: float("nan")}), ("logit_bias", {1.5: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)), ("prompt_logprobs", 65),
    ],
)  # fmt: skip
def test_fields_of_the_engine_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} must be"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["logit_bias", "min_tokens", "bad_words", "n", "prompt_logprobs"])
def test_what_only_an_engine_can_meet_is_refused_elsewhere(field):
    value = {"logit_bias": {1: 1.0}, "bad_words": "no"}.get(field, 3)
    with pytest.raises(ValueError, match=f"SamplingParams.{field} needs an engine"):
        batch([SamplingParams(**{field: value})], 6)


def test_logit_bias_is_stored_as_pairs_and_survives_a_copy():
    p = SamplingParams(logit_bias={9: 1, np.int64(3): -np.inf})
    assert p.logit_bias == ((3, -np.inf), (9, 1.0)) and dataclasses.replace(p, seed=1).logit_bias == p.logit_bias


def test_presence_and_frequency_count_the_output_alone():
    logits = np.array([[2.0, -1.0, 0.5, 3.0, -np.inf, 1.0]], np.float32)
    seen = np.array([[1, 2, 7, 0, 4, 0]], np.int32)  # in the prompt; once, thrice and twice in the output
    p = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0)
    result = np.asarray(run_filter(logits, batch([p], 6), seen))
    assert result[0].tolist() == [2.0, -1.75, 0.5 - 1.25, 3.0, -np.inf, 1.0]
    p = dataclasses.replace(p, repetition_penalty=2.0)  # first, and of the prompt too
    result = np.asarray(run_filter(logits, batch([p], 6), seen))
    assert result[0].tolist() == [1.0, -2.75, 0.25 - 1.25, 3.0, -np.inf, 1.0]


def test_arrays_of_a_batch():
    params = [SamplingParams(temperature=0.5, top_k=2**40, seed=9, ignore_eos=True), SamplingParams(max_tokens=2**40)]
    s = Sampling.from_params(params, eos_ids=[5, 2, 5], vocab_limit=10, pad_to=4, default_seeds=[1, 2**32 + 3])
    assert [a.dtype.name for a in s] == [
        "float32", "int32", "float32", "float32", "float32", "float32", "float32", "uint32", "int32", "bool", "int32", "int32",
    ]  # fmt: skip
    assert all(isinstance(a, np.ndarray) for a in s) and s.vocab_limit.shape == ()
    assert s.temperature.tolist() == [0.5, 1, 0, 0] and s.top_k.tolist() == [2**31 - 1, 0, 0, 0]
    assert s.max_tokens.tolist() == [16, 2**31 - 1, 0, 0] and s.seed.tolist() == [9, 3, 0, 0]
    assert s.top_p.tolist() == s.repetition_penalty.tolist() == [1] * 4 and s.min_p.tolist() == [0] * 4
    assert s.ignore_eos.tolist() == [True, False, False, False] and s.eos.tolist() == [2, 5] + [-1] * 6
    assert is_end(jnp.array([5, 5, 2, -1]), s).tolist() == [False, True, True, False]
    assert is_end(jnp.array([2, 3, 5, 0]), s).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="pad_to must be at least the number of rows, 2; got 1"):
        Sampling.from_params(params, eos_ids=[], vocab_limit=10, pad_to=1, default_seeds=[1, 2])
    with pytest.raises(ValueError, match="one seed for each row, 2; got 1"):
        Sampling.from_params(params, eos_ids=[], vocab_limit=10, default_seeds=[1])
    with pytest.raises(ValueError, match="vocab_limit must be at least 1; got 0"):
        Sampling.from_params(params, eos_ids=[], vocab_limit=0, default_seeds=[1, 2])


# ---- the filters


def awkward_rows(rng, vocab):
    normal = rng.normal(size=(8, vocab)) * 3
    few = np.full(vocab, -np.inf)
    few[rng.permutation(vocab)[:5]] = rng.normal(size=5)
    one = np.full(vocab, -np.inf)
    one[vocab // 2] = -3.0
    peaked = normal[5].copy()
    peaked[rng.permutation(vocab)[:9]] += 25
    rows = [
        normal[0],
        np.round(normal[1]),  # ties
        np.zeros(vocab),
        np.where(np.arange(vocab) % 3 == 0, 1.5, -2.0),  # two plateaus
        few,
        one,
        peaked,
        np.where(rng.random(vocab) < 0.5, -np.inf, normal[6]),
        np.where(rng.random(vocab) < 0.5, -0.0, 0.0),
        1e-3 * normal[7],
        1e30 * normal[7],
    ]
    return np.array(rows, np.float32)


# The second is searched through its best blocks first.
@pytest.mark.parametrize("vocab", [131, pytest.param(20011, marks=pytest.mark.slow)])
def test_each_filter_keeps_the_prefix_of_a_stable_sort(vocab):
    rng = np.random.default_rng(vocab)
    logits = awkward_rows(rng, vocab)
    seen = rng.random(logits.shape) < 0.1
    limit = vocab - 7
    for p in [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7),
        SamplingParams(top_k=130),
        SamplingParams(top_k=vocab - 8),
        SamplingParams(top_k=10**6),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=0.51),
        SamplingParams(top_p=0.953, temperature=0.7),
        SamplingParams(top_p=0.9991, temperature=2.5),
        SamplingParams(min_p=0.051),
        SamplingParams(min_p=1.0),
        SamplingParams(repetition_penalty=1.3, top_k=20),
        SamplingParams(repetition_penalty=0.7, top_p=0.811),
        SamplingParams(temperature=0.8, top_k=50, top_p=0.913, min_p=0.0213, repetition_penalty=1.1),
    ]:
        params = [p] * len(logits)
        result = np.asarray(run_filter(logits, batch(params, limit), seen))
        check_filter(logits, params, seen, limit, result)


def test_exact_prefixes():
    logits = np.log(np.array([[4, 8, 2, 1, 1]], np.float32))

    def keep(**parameters):
        kept = run_filter(logits, batch([SamplingParams(**parameters)], 5), nothing_seen(logits))
        return np.flatnonzero(kept[0] > -np.inf)

    assert keep(top_k=4).tolist() == [0, 1, 2, 3]  # the smaller of the two equal ids
    assert keep(top_p=0.49).tolist() == [1]
    assert keep(top_p=0.74).tolist() == [0, 1]
    assert keep(top_p=0.8).tolist() == [0, 1, 2]
    assert keep(top_p=0.93).tolist() == [0, 1, 2, 3]
    assert keep(top_p=0.95).tolist() == [0, 1, 2, 3, 4]
    assert keep(top_k=2, top_p=0.66).tolist() == [1]  # 8 / 12: top-p after top-k
    assert keep(top_p=0.6, temperature=0.5).tolist() == [1]  # 64 / 86: top-p after temperature
    assert keep(min_p=0.24).tolist() == [0, 1, 2] and keep(min_p=0.26).tolist() == [0, 1]
    assert keep(min_p=0.3, temperature=0.5).tolist() == [1]  # min-p after temperature
    flat = np.zeros((1, 5), np.float32)
    kept = run_filter(flat, batch([SamplingParams(top_p=0.6)], 5), nothing_seen(flat))
    assert np.flatnonzero(kept[0] > -9).tolist() == [0, 1, 2]


NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("-inf")]),
    st.integers(-30 << 16, 30 << 16).map(lambda i: i / 2**16),  # nothing that a division makes subnormal
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_filters_of_drawn_rows(data):
    logits = np.array(data.draw(st.lists(st.lists(NUMBERS, min_size=40, max_size=40), min_size=2, max_size=2)), np.float32)
    logits[:, 11] = np.maximum(logits[:, 11], -30)
    params = data.draw(st.lists(PARAMS, min_size=2, max_size=2))
    seen = np.array(data.draw(st.lists(st.booleans(), min_size=80, max_size=80))).reshape(2, 40)
    result = np.asarray(run_filter(logits, batch(params, 37), seen))
    check_filter(logits, params, seen, 37, result)


def test_the_penalty_falls_once_on_every_seen_id():
    logits = np.array([[2.0, -1.0, 0.0, -np.inf, 3.0, -4.0]], np.float32)
    seen = np.array([[True, True, True, True, False, False]])
    p = SamplingParams(temperature=0, repetition_penalty=2.0)
    result = np.asarray(run_filter(logits, batch([p], 6), seen))
    assert result.tolist() == [[1.0, -2.0, 0.0, -np.inf, 3.0, -4.0]]


# ---- the draw


def test_greedy_takes_the_smallest_of_the_best_ids():
    logits = np.zeros((3, 20011), np.float32)
    logits[0, [5, 19000]] = 1, 1
    logits[1, 20000:] = 7  # beyond the limit
    logits[1, 3] = 1
    logits[2, [2, 9]] = 4, 3
    seen = nothing_seen(logits)
    seen[2, 2] = True
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5)
    params = [greedy, greedy, dataclasses.replace(greedy, repetition_penalty=2.0)]
    positions = np.zeros(3, np.int32)
    assert run(logits, batch(params, 20000), seen, positions, KEY).tolist() == [5, 3, 9]
    for p in (SamplingParams(seed=3), SamplingParams(seed=3, top_k=2)):  # through every id, and through the best blocks
        tokens = run(logits, batch([*params[:2], p], 20000), seen, positions, KEY)
        assert tokens.tolist()[:2] == [5, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-40, 1e39])
def test_hostile_logits(temperature):
    vocab = 40
    rows = np.full((6, vocab), -np.inf, np.float32)
    rows[0, 17] = -5  # all but one
    rows[1, 3] = np.inf
    rows[2, 4], rows[2, 9] = np.nan, 1
    rows[3, 20], rows[3, 39] = np.finfo(np.float32).max, np.inf
    rows[5] = np.nan
    rows = np.where(np.arange(vocab) >= 30, 1e9, rows)  # beyond the limit
    for extra in [
        {},
        {"top_k": 3},
        {"top_p": 0.9},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5},
    ]:
        params = [SamplingParams(temperature=temperature, **extra)] * 6
        tokens = run(rows, batch(params, 30), nothing_seen(rows), np.arange(6, dtype=np.int32), KEY)
        assert tokens.tolist() == [17, 3, 9, 20, 0, 0]


@jax.jit
def draws(logits, sampling, positions):
    """Tokens at positions [N, B] of one sequence."""
    logits = jnp.tile(logits, (positions.shape[1], 1))
    seen = jnp.zeros(logits.shape, bool)
    return lax.map(lambda p: sample(logits, sampling, seen, p, KEY), positions).reshape(-1)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=1.7, top_k=7, top_p=0.953, min_p=0.05)],
)
def test_frequencies(params):
    """Pearson's statistic of 100,000 draws lies within five standard deviations of its mean."""
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32) * 1.5
    kept, _ = oracle_prefix(logits, params, np.zeros(12, bool), 12, 0)
    expected = np.zeros(12)
    expected[kept] = np.exp(logits[kept].astype(np.float64) / params.temperature)
    expected *= 100_000 / expected.sum()
    positions = np.arange(100_000, dtype=np.int32).reshape(-1, 500)
    tokens = np.asarray(draws(logits, batch([params] * 500, 12, seeds=[11] * 500), positions))
    counts = np.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    statistic = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    freedom = len(kept) - 1
    assert abs(statistic - freedom) <= 5 * np.sqrt(2 * freedom), statistic
    # Neighboring positions are independent: so are their pairs' frequencies.
    best = np.argmax(counts)
    share = counts[best] / 100_000
    pairs = np.mean((tokens[1:] == best) & (tokens[:-1] == best))
    assert abs(pairs - share**2) <= 5 * np.sqrt(share**2 / 100_000)


@pytest.mark.slow
def test_the_noise():
    # Known answers of Threefry-2x32-20, published with Random123.
    answers = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, expected in answers:
        assert tuple(int(w) for w in module._threefry(*map(jnp.uint32, key + counter))) == expected
    ids = jnp.arange(2**20, dtype=jnp.int32)[None]
    noise = np.asarray(module._gumbel(jnp.uint32([1]), jnp.array([5]), KEY, ids))[0].astype(np.float64)
    raw, other = jax.random.key_data(KEY), jax.random.key(7, impl="rbg")
    assert np.array_equal(module._gumbel(jnp.uint32([1]), jnp.array([5]), raw, ids)[0], noise)
    assert abs(np.corrcoef(module._gumbel(jnp.uint32([1]), jnp.array([5]), other, ids)[0], noise)[0, 1]) <= 5 / 2**10
    assert np.isfinite(noise).all()
    for moment, expected, deviation in [
        (noise.mean(), 0.57721566, np.pi / np.sqrt(6)),
        (noise.var(), np.pi**2 / 6, np.pi**2 / 6 * 2.1),
        (np.mean(noise > 10), -np.expm1(-np.exp(-10)), np.sqrt(np.exp(-10))),
        (np.mean(noise < -1), np.exp(-np.e), 0.25),
    ]:
        assert abs(moment - expected) <= 5 * deviation / 2**10


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(seed=2, top_k=40),
    SamplingParams(seed=3, top_p=0.9),
    SamplingParams(seed=4, temperature=0.7, top_k=400, top_p=0.8, min_p=0.01, repetition_penalty=1.2),
    SamplingParams(seed=5, min_p=0.2),
    SamplingParams(seed=6, top_p=0.5, temperature=0.6),
]


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [300, 20011])
def test_a_row_does_not_depend_on_the_batch(vocab):
    rng = np.random.default_rng(1)
    rows = 17
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    logits[5:9] = np.round(logits[5:9])
    logits[9:] += np.where(rng.random((8, vocab)) < 0.001, 15, 0).astype(np.float32)
    seen = rng.random((rows, vocab)) < 0.2
    params = [dataclasses.replace(MIXED[i % 7], seed=i) for i in range(rows)]
    positions = rng.integers(0, 1000, rows).astype(np.int32)

    def at(index):
        s = batch([params[i] for i in index], vocab - 5)
        return np.asarray(run(logits[index], s, seen[index], positions[index], KEY))

    tokens = at(np.arange(rows))
    for size in (1, 3) if vocab > 1000 else (1, 2, 7):
        for start in range(0, rows - size + 1, max(1, size // 2)):
            index = np.roll(np.arange(start, start + size), 1)
            assert at(index).tolist() == tokens[index].tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.9999])
def test_every_id_of_a_flat_row_is_drawn(top_p):
    """Also those outside the blocks that are searched first: the mean of 340 uniform ids."""
    logits = np.zeros((17, 20011), np.float32)
    s, seen = batch([SamplingParams(seed=i, top_p=top_p) for i in range(17)], 20000), nothing_seen(logits)
    tokens = np.array([run(logits, s, seen, np.full(17, position, np.int32), KEY) for position in range(20)])
    assert abs(tokens.mean() - 10000) <= 3 * 20000 / np.sqrt(12 * tokens.size)
    assert tokens.max() >= 19500 and tokens.max() < 20000


@pytest.mark.slow
def test_the_filtered_logits_of_a_row_are_bit_equal_in_every_batch():
    rng = np.random.default_rng(8)
    logits = (rng.normal(size=(7, 20011)) * 3).astype(np.float32)
    seen = rng.random(logits.shape) < 0.2
    together = np.asarray(run_filter(logits, batch(MIXED, 20000), seen))
    for index in [[i] for i in range(7)]:
        some = run_filter(logits[index], batch([MIXED[i] for i in index], 20000), seen[index])
        assert np.array_equal(np.asarray(some), together[index])


def test_noise_depends_on_key_seed_position_and_id_alone():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(7, 300)).astype(np.float32)
    seen, positions = nothing_seen(logits), np.arange(7, dtype=np.int32)
    s = batch(MIXED, 300)
    tokens = run(logits, s, seen, positions, KEY).tolist()
    wide = np.concatenate([logits, np.full((7, 724), 50, np.float32)], axis=1)  # a padded vocabulary
    assert run(wide, s, nothing_seen(wide), positions, KEY).tolist() == tokens
    others = [
        run(logits, s._replace(seed=s.seed + np.uint32(1)), seen, positions, KEY),
        run(logits, s, seen, positions + 1, KEY),
        run(logits, s, seen, positions, jax.random.key(8)),
    ]
    for other in others:
        assert other.tolist() != tokens and other[1] == tokens[1]  # the second is greedy


@pytest.mark.slow
def test_the_same_tokens_in_loops_and_under_vmap():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(5, 7, 300)).astype(np.float32)
    seen = rng.random((7, 300)) < 0.1
    s = Sampling(*map(jnp.asarray, batch(MIXED, 290)))
    positions = np.arange(35, dtype=np.int32).reshape(5, 7)
    one_by_one = [run(logits[i], s, seen, positions[i], KEY).tolist() for i in range(5)]
    mapped = jax.jit(jax.vmap(lambda x, p: sample(x, s, seen, p, KEY)))(logits, positions)
    assert mapped.tolist() == one_by_one

    @jax.jit
    def loop(logits, positions):
        def body(state):
            i, out = state
            return i + 1, out.at[i].set(sample(logits[i], s, jnp.asarray(seen), positions[i], KEY))

        return lax.while_loop(lambda state: state[0] < 5, body, (0, jnp.zeros((5, 7), jnp.int32)))[1]

    assert loop(logits, positions).tolist() == one_by_one


# ---- log-probabilities


def test_token_logprobs():
    rng = np.random.default_rng(6)
    logits = np.round(rng.normal(size=(9, 700)) * 8, 1).astype(np.float32)
    logits[0, :690] = -np.inf
    logits[1] = np.where(np.arange(700) % 2, -0.0, 0.0)
    chosen = np.array([699, 4, 0, 5, 6, 7, 8, 9, 10], np.int32)
    logprobs = jax.jit(token_logprobs, static_argnums=2)
    ids, values = map(np.asarray, logprobs(logits, chosen, 12))
    assert ids.shape == values.shape == (9, 13) and ids.dtype == np.int32 and values.dtype == np.float32
    x = logits.astype(np.float64)
    exact = x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
    for row in range(9):
        assert ids[row].tolist() == [chosen[row], *np.argsort(-x[row], kind="stable")[:12].tolist()]
        np.testing.assert_allclose(values[row], exact[row, ids[row]], rtol=2e-6, atol=2e-6)
        for size in (1, 2):
            alone = logprobs(np.repeat(logits[row : row + 1], size, 0), np.repeat(chosen[row], size), 12)
            assert np.array_equal(np.asarray(alone[1])[size - 1], values[row])
    ids, values = logprobs(logits, chosen, 0)
    assert ids.shape == values.shape == (9, 1) and ids[:, 0].tolist() == chosen.tolist()
    with pytest.raises(ValueError, match=r"k must be in \[0, 700\]"):
        token_logprobs(logits, chosen, 701)
