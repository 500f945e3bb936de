"""The C++ kernels for CPUs from Python: every format against exact weights, rows that do not see each other, and what happens
without a compiler. tests/native tests sizes and memory errors."""

import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from ferrum_jax import loading
from pallas_kernels import dispatch, native
from pallas_kernels.blocks import GROUPS, format_of
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.synthetic import random_blocks
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.native import build, tables
from pallas_kernels.quantized_matmul import quantized_matmul, quantized_matmuls, swiglu
from support.compiler import needs_compiler

pytestmark = needs_compiler
K = 256


def blocks_of(format, *shape, seed=0):
    """Random stored blocks [*shape[:-1], width] and their exact weights, float64."""
    rng = np.random.default_rng(seed)
    raw = random_blocks(format, int(np.prod(shape[:-1])), shape[-1], rng, shape[-1] ** -0.5)
    stored = raw.view(format_of(format).storage).reshape(*shape[:-1], -1)
    exact = np.asarray(format_of(format).decode(jnp.asarray(stored)), np.float64)
    return jnp.asarray(stored), exact.reshape(shape)


def rows_of(m, k=K, seed=1):
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


def rounding(x, weights):
    """How far an int8 product may lie from the exact one: half a step of each block of 32, whatever the signs, and float32."""
    size = x.shape[1]
    steps = np.abs(x.astype(np.float64)).reshape(len(x), -1, 32).max(-1) / 127
    sums = np.abs(weights).reshape(len(weights), -1, 32).sum(-1)
    return 0.5001 * steps @ sums.T + size * 2.0**-23 * np.abs(x) @ np.abs(weights).T + 1e-30


@functools.partial(jax.jit, static_argnames="count")
def multiply(x, matrices, count):
    return quantized_matmuls(x, [matrix.at(1) for matrix in matrices[:count]], "int8")


def test_the_kernels_are_there():
    assert native.refusal() is None and native.isa() in ("portable", "avx2", "avx512_vnni", "amx")


def test_the_grids_in_the_header_are_those_of_gguf():
    rows = tables._rows()
    for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"):
        kind = getattr(quants, name)
        kind.init_grid()
        grid, found = kind.grid.reshape(-1, kind.grid.shape[-1]), rows[f"k{name.title().replace('_', '')}Grid"]
        np.testing.assert_array_equal(found, 8 * grid + 9 if name == "IQ1_S" else grid)
    for name, signs in {"kSigns": bytes(range(256)), "kEvenSigns": quants.IQ2_XXS.ksigns}.items():
        bits = np.unpackbits(np.frombuffer(signs, np.uint8)[:, None], axis=1, bitorder="little")
        np.testing.assert_array_equal(rows[name], 255 * bits.astype(np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("format", native.FORMATS)
def test_products_lie_within_the_rounding_of_the_activations(format, m):
    stored, exact = blocks_of(format, 2, 37, K)
    x = rows_of(m)
    with dispatch.record() as choices:
        (y,) = multiply.__wrapped__(x, (Matrix.of(stored, format),), 1)
    assert [choice.backend for choice in choices] == ["native"]
    want = x.astype(np.float64) @ exact[1].T
    assert (np.abs(np.asarray(y) - want) <= rounding(x, exact[1])).all()


@pytest.mark.parametrize(
    "format", [pytest.param(f, marks=pytest.mark.slow) if f in GROUPS and f != "U8_64_BF16" else f for f in native.FORMATS]
)
def test_int8x2_keeps_what_the_first_rounding_leaves_out(format):
    stored, exact = blocks_of(format, 2, 37, K)
    matrix, x = Matrix.of(stored, format).at(1), rows_of(17) * np.linspace(0.01, 30, K, dtype=np.float32)
    with dispatch.record() as choices:
        y = np.asarray(quantized_matmul(x, matrix, "int8x2"))
    assert [choice.backend for choice in choices] == ["native"]
    float32 = K * 2.0**-23 * np.abs(x) @ np.abs(exact[1]).T
    assert (np.abs(y - x.astype(np.float64) @ exact[1].T) <= rounding(x, exact[1]) / 120 + float32).all()
    alone = np.asarray(quantized_matmul(x[3:4], matrix, "int8x2"))
    assert (alone.view(np.uint32) == y[3:4].view(np.uint32)).all()
    x[5, 7] = np.nan
    broken = np.asarray(quantized_matmul(x, matrix, "int8x2"))
    assert np.isnan(broken[5]).all() and (np.delete(broken, 5, 0) == np.delete(y, 5, 0)).all()


@pytest.mark.parametrize("format", ["Q4_K", "Q6_K", "Q4_1", "U4_128_F16", "Q2_K", "NVFP4", "IQ3_S", "U8_128_F32", "BF16"])
def test_a_row_has_the_same_bits_whatever_else_is_there(format):
    matrix = Matrix.of(blocks_of(format, 2, 70, 512)[0], format)
    x = rows_of(130, 512)
    whole = np.asarray(multiply(x, (matrix,), 1)[0])
    for first, last in ((0, 1), (5, 7), (3, 11), (40, 104), (127, 130)):
        part = np.asarray(multiply(x[first:last], (matrix,), 1)[0])
        assert (part.view(np.uint32) == whole[first:last].view(np.uint32)).all()


def test_several_formats_in_one_call():
    formats = ("Q4_K", "Q6_K", "Q8_0")
    parts = [blocks_of(format, 2, 9 + i, K, seed=i) for i, format in enumerate(formats)]
    matrices = tuple(Matrix.of(stored, format) for (stored, _), format in zip(parts, formats, strict=True))
    x = rows_of(4)
    together = multiply(x, matrices, 3)
    for y, matrix, (_, exact) in zip(together, matrices, parts, strict=True):
        assert (np.asarray(y) == np.asarray(multiply(x, (matrix,), 1)[0])).all()
        assert (np.abs(np.asarray(y) - x.astype(np.float64) @ exact[1].T) <= rounding(x, exact[1])).all()


def test_swiglu_is_that_of_the_products():
    gate, up = (Matrix.of(blocks_of("Q4_K", 40, K, seed=seed)[0], "Q4_K") for seed in (3, 4))
    x = rows_of(5)
    y = np.asarray(jax.jit(lambda x: swiglu(x, gate, up, "int8"))(x), np.float64)
    a, b = (np.asarray(quantized_matmul(x, matrix, "int8"), np.float64) for matrix in (gate, up))
    want = a / (1 + np.exp(-a)) * b
    assert (np.abs(y - want) <= 1e-5 * np.abs(want) + 1e-7).all()


@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
def test_mixtures_are_sums_in_the_order_of_ranks(tokens):
    experts, top_k, width, k = 6, 3, 64, 256
    (gate, exact_gate), (up, exact_up) = (blocks_of("Q4_0", 2, experts, width, k, seed=seed) for seed in (5, 6))
    down, exact_down = blocks_of("Q8_0", 2, experts, k, width, seed=7)
    rng = np.random.default_rng(8)
    x = rows_of(tokens, k)
    expert_ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    expert_ids[0, 1] = experts  # nobody
    expert_ids[expert_ids == 4] = 3  # an expert that no token chose
    weights = rng.random((tokens, top_k)).astype(np.float32)
    poisoned = down.at[1, 4].set(255)

    @jax.jit
    def mixture(x, expert_ids, weights, down):
        matrices = [Matrix.of(stored, format).at(1) for stored, format in ((gate, "Q4_0"), (up, "Q4_0"), (down, "Q8_0"))]
        return expert_ffn(x, expert_ids, weights, *matrices, arithmetic="int8")

    y = np.asarray(mixture(x, expert_ids, weights, poisoned))
    want = np.zeros((tokens, k))
    for token in range(tokens):
        for rank in range(top_k):
            if (e := expert_ids[token, rank]) < experts:
                a, b = exact_gate[1, e] @ x[token], exact_up[1, e] @ x[token]
                want[token] += weights[token, rank] * (exact_down[1, e] @ (a / (1 + np.exp(-a)) * b))
    assert np.abs(y - want).max() <= 0.02 * np.abs(want).max()
    alone = np.asarray(mixture(x[:1], expert_ids[:1], weights[:1], down))
    assert (alone.view(np.uint32) == y[:1].view(np.uint32)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    matrix = Matrix.of(blocks_of("Q4_K", 2, 33, K)[0], "Q4_K")
    x = rows_of(6)
    clean = np.asarray(multiply(x, (matrix,), 1)[0])
    x[2, 100] = bad
    y = np.asarray(multiply(x, (matrix,), 1)[0])
    assert np.isnan(y[2]).all() and (np.delete(y, 2, 0) == np.delete(clean, 2, 0)).all()


def test_zeros_and_huge_numbers():
    matrix = Matrix.of(blocks_of("Q4_K", 2, 33, K)[0], "Q4_K")
    assert (np.asarray(multiply(np.zeros((2, K), np.float32), (matrix,), 1)[0]) == 0).all()
    x = rows_of(2)
    big = np.asarray(multiply(x * np.float32(2.0**80), (matrix,), 1)[0])
    assert np.isfinite(big).all() and np.allclose(big / 2.0**80, np.asarray(multiply(x, (matrix,), 1)[0]), rtol=1e-5, atol=1e-6)


def test_without_a_compiler_plain_xla_serves_and_says_why(monkeypatch, fresh_library):
    monkeypatch.setattr(build, "_compiler", lambda: None)
    stored, exact = blocks_of("Q8_0", 8, K)
    with dispatch.record() as choices:
        y = quantized_matmul(rows_of(2), Matrix.of(stored, "Q8_0"), "int8")
    assert choices[0].backend == "xla" and "no C++ compiler" in choices[0].reason
    assert np.allclose(np.asarray(y), rows_of(2) @ exact.T, atol=1e-4)
    assert loading.auto_dtype(dispatch.Target("cpu")) == "float32"


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, fresh_library):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    original = subprocess.run

    def run(command, **options):
        return original(["false"] if "-shared" in command else command, **options)

    monkeypatch.setattr(build.subprocess, "run", run)
    assert "failed" in build.refusal()


def call(name, results, *operands, **attributes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.block_until_ready(jax.ffi.ffi_call(name, shapes)(*operands, **attributes))


MISTAKES = {
    "index 2 of a stack of 2": {"index": 2},
    "no kernels for the block format 'Q9_K'": {"formats": "Q9_K"},
    "there are fewer formats than matrices": {"formats": "Q8_0", "count": 2},
    "arithmetic must be one of int8, int8x2, float32, not 'int7'": {"arithmetic": "int7"},
    "rows of 272 bytes do not hold 128 weights": {"columns": 128},
    "a result does not fit its matrix": {"rows": 4},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_call_that_does_not_fit_says_so(words):
    case = {"index": 0, "formats": "Q8_0,Q8_0", "arithmetic": "int8", "columns": K, "count": 1, "rows": 5} | MISTAKES[words]
    assert native.refusal() is None
    stored, _ = blocks_of("Q8_0", 2, 5, K)
    pair = (np.int32(case["index"]), stored)
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        x = jnp.ones((3, case["columns"]), jnp.float32)
        attributes = {name: case[name] for name in ("formats", "arithmetic")}
        call("ferrum_matmuls", [(3, case["rows"])] * case["count"], x, *pair * case["count"], **attributes)


def test_an_expert_that_is_not_there_is_refused():
    assert native.refusal() is None
    stored, _ = blocks_of("Q8_0", 2, K, K)
    experts = [np.int32(0), stored] * 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="expert 7 of 2"):
        ids, weights = np.asarray([[0, 7]], np.int32), np.ones((1, 2), np.float32)
        attributes = {"formats": "Q8_0,Q8_0,Q8_0", "arithmetic": "int8", "limit": np.float32(np.inf), "alpha": np.float32(1)}
        call("ferrum_experts", [(1, K)], rows_of(1), ids, weights, *experts, **attributes)
