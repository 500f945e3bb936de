"""The TPU kernels for compressed matrices, interpreted, against float64 products of the unpacked weights.

The bounds are those of the arithmetic. Few rows: the codes are exact, the products of 128 of them with x are summed in
float32 in any order, and each group then takes a handful of roundings; what a minimum takes away counts at its full size.
Many rows: a weight is rounded to bfloat16 once, and k products are summed. `RACES` simulates the copies, with memory that
is NaN until it is written, so a bound that holds says also that nothing was read too early.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import FORMATS, tpu
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.synthetic import random_blocks
from pallas_kernels.dispatch import Case, Target
from pallas_kernels.grouped_matmul import grouping
from pallas_kernels.grouped_matmul import mosaic_tpu as grouped
from pallas_kernels.grouped_matmul.parts import Biases, Clamp
from pallas_kernels.grouped_matmul.tpu_grouping import group_few
from pallas_kernels.quantized_matmul import BACKENDS, tpu_tiles
from pallas_kernels.quantized_matmul import mosaic_tpu as dense

V5E = Target("tpu", "v5e")
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the most that rounding changes a number by, relative to it
CODES_AT = {"Q4_1": 4, "Q5_1": 4, "Q4_K": 16, "Q5_K": 16}  # where the codes of a block begin, in formats with minima
BY_32 = [format for format in tpu.PACKINGS if FORMATS[format].block_size == 32]


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Each program runs once, so XLA need not optimize it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def decoded(blocks, format):
    return np.asarray(FORMATS[format].decode(jnp.asarray(blocks)), np.float64)


class Weights:
    """One matrix, or experts of which only the chosen may be read: the others, and another layer, are poison."""

    def __init__(self, rng, format, n, k, experts=None, chosen=()):
        count = experts or 1
        blocks = random_blocks(format, count * n, k, rng, k**-0.5).reshape(count, n, -1)
        self.w = decoded(blocks, format)
        self.size = np.abs(self.w)
        if format in CODES_AT:
            blank = blocks.reshape(count, n, -1, FORMATS[format].block_bytes).copy()
            blank[..., CODES_AT[format] :] = 0
            minima = decoded(blank.reshape(blocks.shape), format)
            self.size = np.abs(self.w - minima) + np.abs(minima)
        planes = [np.stack(part) for part in zip(*(tpu.pack(jnp.asarray(one), format) for one in blocks), strict=True)]
        poison = {"d": 0x7E00, "s": -1, "q": 0x7F, "h": 0x7F}
        layers = []
        for name, plane in zip(tpu.plane_names(format), planes, strict=True):
            bad = np.array(poison[name]).astype(plane.dtype)
            if experts:
                plane[[e for e in range(experts) if e not in chosen]] = bad
            plane = plane if experts else plane[0]
            layers.append(jnp.stack([jnp.full(plane.shape, bad), jnp.asarray(plane)]))
        self.matrix = Matrix(tuple(layers), (), format, "tpu", n, k).at(1)

    def product(self, x, many, error=0.0, expert=0):
        """x [m, k] float64, known up to `error`, times the matrix: the product and its bound."""
        w, size, k = self.w[expert], self.size[expert], x.shape[1]
        most = np.abs(x) + error
        relative = (k + 16) * FLOAT32 if many else (128 + k / 8) * FLOAT32
        bound = 1.01 * (
            relative * most @ size.T + many * BFLOAT16 * most @ np.abs(w).T + (error * np.ones_like(x)) @ np.abs(w).T
        )
        return x @ w.T, bound


def swiglu(gate, up, clamp=None):
    """Rounded to bfloat16, of two (value, bound) pairs."""
    (g, g_error), (u, u_error) = gate, up
    if clamp is not None:
        g, u = np.minimum(g, clamp.limit), np.clip(u, -clamp.limit, clamp.limit) + 1
    silu = g / (1 + np.exp(-(clamp.alpha if clamp else 1) * g))
    error = 1.1 * g_error * (np.abs(u) + u_error) + np.abs(silu) * u_error + 1e-6 * np.abs(silu * u)
    return silu * u, error + 1.01 * BFLOAT16 * (np.abs(silu * u) + error)


def biased(product, bias):
    """A (value, bound) pair and a bias."""
    exact, error = product
    return exact + bias, error + FLOAT32 * (np.abs(exact) + error + np.abs(bias))


def activations(rng, m, k):
    return jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)


def assert_within(found, expected):
    exact, bound = expected
    assert found.shape == exact.shape
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


@functools.partial(jax.jit, static_argnames="format")
def through_the_layout(blocks, ids, format):
    """The blocks packed and decoded: all, rows 5..74 of a stack, and single rows; and the result of FORMATS."""
    known, n = FORMATS[format], blocks.shape[0]
    k = blocks.shape[1] // known.block_bytes * known.block_size
    planes = tpu.pack(blocks, format)
    stacked = tuple(jnp.stack([plane * 0, plane]) for plane in planes)
    part = tpu.rows(stacked, (jnp.int32(1),), 5, 70)
    picked = tpu.decode(tpu.gather(planes, ids), format, len(ids), k)
    return planes, (known.decode(blocks), tpu.decode(planes, format, n, k), tpu.decode(part, format, 70, k), picked)


@pytest.mark.parametrize("format", tpu.PACKINGS)
def test_layout(format):
    """Packing loses nothing, for any bytes: scales that are NaN, infinite or subnormal too."""
    rng = np.random.default_rng(1)
    n, k = 300, 352 if format in BY_32 else 512
    blocks = jnp.asarray(rng.integers(0, 256, (n, FORMATS[format].row_bytes(k)), dtype=np.uint8))
    ids = np.array([n - 1, 0, 64])
    planes, decoded = through_the_layout(blocks, jnp.asarray(ids), format)
    assert [(p.shape, p.dtype) for p in planes] == [(p.shape, p.dtype) for p in tpu.plane_shapes(format, n, k)]
    assert all(p.shape[0] % 8 == 0 and p.shape[1] % 128 == 0 for p in planes)
    expected, *found = (np.asarray(values) for values in decoded)
    for values, rows in zip(found, (slice(None), slice(5, 75), ids), strict=True):
        wanted = expected[rows]
        assert np.all((values.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(values) & np.isnan(wanted)))


def test_what_fits():
    assert (
        tpu.fits("Q4_K", 768, 2048) is None and tpu.fits("Q4_K", 2048, 768) is None and tpu.fits("Q6_K", 151936, 2048) is None
    )
    for format in tpu.PACKINGS:
        assert tpu.fits(format, 4096, 2048) is None
    assert "no TPU memory layout" in tpu.fits("Q2_K", 128, 256)
    assert tpu.fits("MXFP4", 2880, 2880) is None and tpu.fits("Q8_0", 4096, 2880) is None
    assert "not a multiple of 32" in tpu.fits("Q8_0", 128, 580)
    assert "bytes" in tpu.fits("Q8_0", 128, 576)
    assert "not a multiple of 256" in tpu.fits("Q4_K", 128, 896)
    assert "bytes" in tpu.fits("Q8_0", 130, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("m", [3, 11, 40])
def test_every_format_in_one_launch(m):
    rng = np.random.default_rng(m)
    weights = [Weights(rng, format, 100 + 32 * i, 256) for i, format in enumerate(tpu.PACKINGS)]
    x = activations(rng, m, 256)
    found = dense.matmuls(x, [w.matrix for w in weights], V5E, True)
    for y, w in zip(found, weights, strict=True):
        assert_within(y, w.product(np.asarray(x, np.float64), many=m > dense.FEW_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 6, 17])
def test_half_a_run_at_the_end(m):
    rng = np.random.default_rng(m)
    weights = [Weights(rng, format, 128, 384) for format in ("Q4_0", "Q5_1", "Q8_0", "MXFP4")]
    x = activations(rng, m, 384)
    for y, w in zip(dense.matmuls(x, [w.matrix for w in weights], V5E, True), weights, strict=True):
        assert_within(y, w.product(np.asarray(x, np.float64), many=m > dense.FEW_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 8, 30])
def test_half_a_run_is_all(m):
    rng = np.random.default_rng(m)
    w = Weights(rng, "Q5_1", 128, 128)
    x = activations(rng, m, 128)
    assert_within(dense.matmul(x, w.matrix, V5E, RACES), w.product(np.asarray(x, np.float64), many=m > dense.FEW_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("m", [4, 5, 33])
@pytest.mark.parametrize(("format", "k"), [("Q5_1", 5 * 256 + 128), ("Q6_K", 6 * 256)])
def test_long_rows_are_a_loop(m, format, k, monkeypatch):
    monkeypatch.setattr(tpu_tiles, "_UNROLLED", 1)
    monkeypatch.setattr(tpu_tiles, "_BODY", 2)
    rng = np.random.default_rng(k)
    w = Weights(rng, format, 72, k)
    x = activations(rng, m, k)
    assert_within(dense.matmul(x, w.matrix, V5E, True), w.product(np.asarray(x, np.float64), many=m > dense.FEW_ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_shapes_drawn_at_random(seed):
    rng = np.random.default_rng(100 + seed)
    format = str(rng.choice(list(tpu.PACKINGS)))
    m, n, k = (int(rng.integers(*limits)) for limits in ((1, 70), (1, 1400), (1, 4)))
    k *= 256
    w = Weights(rng, format, n, k)
    x = activations(rng, m, k)
    assert_within(dense.matmul(x, w.matrix, V5E, RACES), w.product(np.asarray(x, np.float64), many=m > dense.FEW_ROWS))


def test_many_tiles_of_rows_and_columns():
    rng = np.random.default_rng(5)
    w = Weights(rng, "Q8_0", 1100, 128)
    x = activations(rng, 1030, 128)
    assert_within(dense.matmul(x, w.matrix, V5E, RACES), w.product(np.asarray(x, np.float64), many=True))


@pytest.mark.slow
@pytest.mark.parametrize("m", [2, 7, 25])
def test_swiglu(m):
    rng = np.random.default_rng(m)
    gate, up = Weights(rng, "Q5_K", 130, 256), Weights(rng, "Q6_K", 130, 256)
    x = activations(rng, m, 256)
    found = dense.swiglu(x, gate.matrix, up.matrix, V5E, True)
    assert found.dtype == jnp.bfloat16
    exact, many = np.asarray(x, np.float64), m > dense.FEW_ROWS
    assert_within(found, swiglu(gate.product(exact, many), up.product(exact, many)))


@pytest.mark.parametrize("m", [4, 16, 40])
def test_a_row_does_not_depend_on_the_others(m):
    rng = np.random.default_rng(m)
    w = Weights(rng, "Q4_K", 128, 512)
    x = activations(rng, m, 512).at[1].set(jnp.nan)
    found = np.delete(dense.matmul(x, w.matrix, V5E, True), 1, 0)
    assert_within(found, w.product(np.delete(np.asarray(x, np.float64), 1, 0), many=m > dense.FEW_ROWS))


SIZES = [[3, 0, 9, 0, 1], [0, 0, 0, 0, 20], [0] * 5, pytest.param([130, 0, 150, 7, 0], marks=pytest.mark.slow)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped(sizes):
    rng = np.random.default_rng(sum(sizes))
    chosen = [e for e, size in enumerate(sizes) if size]
    w = Weights(rng, "Q4_K", 200, 256, len(sizes), chosen)
    m = sum(sizes) + 3
    x = activations(rng, m, 256)
    found = grouped.grouped(x, jnp.asarray(sizes, jnp.int32), w.matrix, V5E, RACES)
    exact, many, at = np.asarray(x, np.float64), m > grouped.FEW * len(sizes), 0
    for e, size in enumerate(sizes):
        assert_within(found[at : at + size], w.product(exact[at : at + size], many, expert=e))
        at += size
    np.testing.assert_array_equal(found[at:], 0)


def routing(rng, tokens, top_k, num_experts, nobody=0.0):
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    ids[rng.random(ids.shape) < nobody] = num_experts
    return ids, rng.random((tokens, top_k)).astype(np.float32)


def check_ffn(rng, ids, weights, num_experts, formats, interpret, k=256, n=256, clamp=None):
    """The feed-forward of every token by its own experts, rank by rank, with the errors allowed on the way. With a clamp,
    with biases as well."""
    tokens, top_k = ids.shape
    chosen = set(ids.flat) - {num_experts}
    gate, up = (Weights(rng, format, n, k, num_experts, chosen) for format in formats[:2])
    down = Weights(rng, formats[2], k, n, num_experts, chosen)
    x = activations(rng, tokens, k)
    matrices = (gate.matrix, up.matrix, down.matrix)
    biases = Biases(*(rng.normal(0, 0.5 if clamp else 0, (num_experts, m)).astype(np.float32) for m in (n, n, k)))
    more = (jax.tree.map(jnp.asarray, biases) if clamp else None, clamp, interpret)
    found = grouped.expert_ffn(x, jnp.asarray(ids), jnp.asarray(weights), *matrices, V5E, *more)
    many = ids.size > grouped.FEW * num_experts
    exact, total, bound = np.asarray(x, np.float64), np.zeros((tokens, k)), np.zeros((tokens, k))
    for token, slot in np.ndindex(*ids.shape):
        if (e := ids[token, slot]) < num_experts:
            row = exact[token : token + 1]
            of_gate, of_up = (biased(w.product(row, many, expert=e), b[e]) for w, b in ((gate, biases.gate), (up, biases.up)))
            hidden, error = swiglu(of_gate, of_up, clamp)
            y, error = biased(down.product(hidden, many, error, expert=e), biases.down[e])
            total[token] += weights[token, slot] * y[0]
            bound[token] += weights[token, slot] * (error[0] + (top_k + 2) * FLOAT32 * np.abs(y[0]))
    assert_within(found, (total, 1.01 * bound))
    return found


CASES = {
    "decode": (6, 2, 8, 0.2, ("Q4_K", "Q4_K", "Q6_K")),
    "one token, one expert": (1, 1, 1, 0.0, ("Q4_K", "Q4_K", "Q4_K")),
    "nobody": (3, 2, 4, 1.1, ("Q8_0", "Q8_0", "Q5_1")),
    "three formats": (20, 4, 16, 0.1, ("Q5_K", "IQ4_NL", "MXFP4")),
    "prefill": (90, 3, 4, 0.1, ("Q4_K", "Q4_K", "Q6_K")),
    "clamped decode": (6, 2, 8, 0.2, ("MXFP4", "MXFP4", "MXFP4")),
    "clamped prefill": (40, 2, 4, 0.1, ("MXFP4", "MXFP4", "MXFP4")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_expert_ffn(case):
    tokens, top_k, num_experts, nobody, formats = CASES[case]
    rng = np.random.default_rng(tokens)
    ids, weights = routing(rng, tokens, top_k, num_experts, nobody)
    clamp = Clamp(limit=0.5, alpha=1.702) if "clamped" in case else None
    size = 288 if case == "clamped prefill" else 256  # no multiple of 128, as gpt-oss has
    check_ffn(rng, ids, weights, num_experts, formats, RACES, size, size, clamp)


@pytest.mark.slow
def test_one_expert_of_128_takes_all():
    rng = np.random.default_rng(8)
    ids = np.full((11, 1), 77, np.int32)
    check_ffn(rng, ids, np.ones((11, 1), np.float32), 128, ("Q4_0", "Q4_0", "Q4_0"), RACES, k=128, n=128)


@pytest.mark.slow
def test_experts_too_large_for_one_kernel(monkeypatch):
    monkeypatch.setattr(grouped, "_fused_bytes", lambda *sizes: dense.VMEM + 1)
    rng = np.random.default_rng(9)
    ids, weights = routing(rng, 5, 2, 4, 0.2)
    check_ffn(rng, ids, weights, 4, ("Q4_K", "Q4_K", "Q6_K"), True, n=512)


@functools.partial(jax.jit, static_argnames=("num_experts", "tile_rows", "aligned"))
def group(ids, num_experts, tile_rows, aligned):
    return grouping.group(ids, num_experts, tile_rows, aligned=aligned)


def expected_tiles(ids, num_experts, tile_rows, aligned):
    tiles, start = [], 0
    for expert, size in enumerate(np.bincount(ids, minlength=num_experts + 1)[:num_experts]):
        at, end = start, start + size
        while at < end:
            stop = min(end, (at // tile_rows + 1) * tile_rows if aligned else at + tile_rows)
            tiles.append((expert, at, stop - at))
            at = stop
        start = end
    return tiles


ROUTINGS = [(1, 1, 8), (8, 128, 8), (256, 128, 8), (1024, 4, 16), (1025, 128, 128), (3000, 7, 128)]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "num_experts", "tile_rows"), ROUTINGS)
@pytest.mark.parametrize("kind", ["random", "nobody", "the last"])
def test_grouping(count, num_experts, tile_rows, kind):
    random = np.random.default_rng(count).integers(0, num_experts + 1, count)
    ids = {"random": random, "nobody": random * 0 + num_experts, "the last": random * 0 + num_experts - 1}[kind]
    order = np.argsort(ids, kind="stable")
    for aligned in (False, True):
        expected = expected_tiles(ids, num_experts, tile_rows, aligned)
        groups = group(jnp.asarray(ids, jnp.int32), num_experts, tile_rows, aligned)
        np.testing.assert_array_equal(groups.order, order)
        np.testing.assert_array_equal(np.asarray(groups.place)[order], np.arange(count))
        np.testing.assert_array_equal(groups.sizes, np.bincount(ids, minlength=num_experts + 1)[:num_experts])
        assert len(groups.tile_rows) == grouping.max_tiles(count, num_experts, tile_rows) >= len(expected)
        check_tiles(groups.num_tiles, groups.tile_expert, groups.tile_start, groups.tile_rows, expected)
    if count <= 1024:
        work = group_few(jnp.asarray(ids, jnp.int32), num_experts, tile_rows, RACES)
        np.testing.assert_array_equal(work.order[0, :count], order)
        expected = expected_tiles(ids, num_experts, tile_rows, False)
        assert work.num_tiles == max(1, len(expected))
        check_tiles(len(expected), work.tile_expert[0], work.tile_start[0], work.tile_rows[0], expected)


def check_tiles(num_tiles, experts, starts, rows, expected):
    used = len(expected)
    assert num_tiles == used
    found = np.stack([experts, starts, rows], 1)
    np.testing.assert_array_equal(found[:used], np.array(expected).reshape(used, 3))
    assert not found[used:, 2].any()
    assert used == 0 or np.all(found[used:, 0] == found[used - 1, 0])


def test_what_is_refused():
    case = Case("quantized_matmul", V5E, "Q4_K", "bfloat16", "tpu", (1, 128, 256))
    refuses = {backend.name: backend.refuses for backend in BACKENDS}["mosaic_tpu"]
    assert refuses(case) is None and grouped.refuses(case) is None
    for change, why in [
        ({"target": Target("gpu", "9.0")}, "TPU"),
        ({"memory_layout": "ggml"}, '"ggml"'),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
    ]:
        assert why in refuses(Case(**(vars(case) | change)))
