"""Contracts of the compressed products, on every backend: numbers against float64, bits of rows, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.blocks import FORMATS
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.grouped_matmul import grouped_matmul, matmul_by_head
from pallas_kernels.quantized_matmul import quantized_matmul, xla
from pallas_kernels.reductions import row_sum
from support.random_models import stored

RNG = np.random.default_rng(11)


def matrices(format: str, *shape: int) -> tuple[jax.Array, np.ndarray]:
    """Stored blocks and their weights in float64."""
    blocks = stored(format, shape, np.random.default_rng(len(format) + shape[-1]), shape[-1] ** -0.5)
    return jnp.asarray(blocks), np.asarray(FORMATS[format].decode(jnp.asarray(blocks)), np.float64)


def rows(m: int, k: int, dtype="float32") -> jax.Array:
    return jnp.asarray(RNG.standard_normal((m, k)), dtype)


def bound(k: int, dtype: str) -> float:
    """Rounding of k products with operands of unit size over sqrt(k): accumulation in float32, operands in dtype."""
    ulp = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}[dtype]
    return 8 * (2.0**-24 * k**0.5 + 2 * ulp)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_multiplies(format):
    weights, exact = matrices(format, 2, 24, 256)
    x = rows(3, 256)
    y = jax.jit(lambda x, w: quantized_matmul(x, Matrix.of(w, format, (1,))))(x, weights)
    assert y.dtype == jnp.float32
    assert np.abs(np.asarray(y) - np.asarray(x, np.float64) @ exact[1].T).max() <= bound(256, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (1, 7, 64), (5, 33, 96), (40, 130, 320)])
def test_odd_shapes_and_dtypes(m, n, k, dtype):
    weights, exact = matrices("Q8_0", n, k)
    x = rows(m, k, dtype)
    y = quantized_matmul(x, Matrix.of(weights, "Q8_0"))
    assert y.shape == (m, n)
    assert np.abs(np.asarray(y) - np.asarray(x, np.float64) @ exact.T).max() <= bound(k, dtype)


@pytest.mark.slow
def test_a_matrix_of_many_tiles(monkeypatch):
    """Row tiles, the last one overlapping the one before: every row once, in the product and in its derivative."""
    weights, exact = matrices("Q5_0", 2, 203, 64)
    x, dy = rows(4, 64), rows(4, 203)

    def both(x, dy):
        y, back = jax.vjp(lambda x: quantized_matmul(x, Matrix.of(weights, "Q5_0", (1,))), x)
        return y, back(dy)[0]

    whole = jax.jit(both)(x, dy)
    monkeypatch.setattr(xla, "TILE_BYTES", 4 * 64 * 30)
    jax.clear_caches()
    tiled = jax.jit(lambda *a: both(*a))(x, dy)
    for y in (whole[0], tiled[0]):
        assert np.abs(np.asarray(y) - np.asarray(x, np.float64) @ exact[1].T).max() <= bound(64, "float32")
    for dx in (whole[1], tiled[1]):
        assert np.abs(np.asarray(dx) - np.asarray(dy, np.float64) @ exact[1]).max() <= 4 * bound(203, "float32")


def test_rows_keep_their_bits_in_any_batch():
    weights, _ = matrices("Q4_K", 300, 512)
    x = rows(512, 512)
    product = jax.jit(lambda x: quantized_matmul(x, Matrix.of(weights, "Q4_K")))
    whole = np.asarray(product(x))
    for m in (1, 2, 3, 16, 100):
        assert (np.asarray(product(x[:m])) == whole[:m]).all(), m
        assert (np.asarray(product(x[512 - m :])) == whole[512 - m :]).all(), m


def test_row_sums_keep_their_bits_in_any_batch():
    x = rows(512, 576)
    whole = np.asarray(jax.jit(row_sum)(x))
    assert np.abs(whole[:, 0] - np.asarray(x, np.float64).sum(-1)).max() <= 1e-4
    for m in (1, 2, 17, 100):
        assert (np.asarray(jax.jit(row_sum)(x[:m])) == whole[:m]).all()


def expected_groups(x, sizes, exact) -> np.ndarray:
    y, start = np.zeros((x.shape[0], exact.shape[1])), 0
    for expert, size in enumerate(sizes):
        y[start : start + size] = np.asarray(x[start : start + size], np.float64) @ exact[expert].T
        start += size
    return y


@pytest.mark.parametrize(
    "sizes",
    [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [3, 0, 17, 2], [70, 1, 0, 300], [0, 150, 0, 0], [16, 16, 16, 16]],
    ids=str,
)
def test_groups(sizes):
    """Empty experts, single rows, groups of many tiles, rows without an expert at the end."""
    weights, exact = matrices("Q8_0", 3, 4, 40, 64)
    x = rows(sum(sizes) + 5, 64)
    y = jax.jit(lambda x, s: grouped_matmul(x, s, Matrix.of(weights, "Q8_0", (2,))))(x, jnp.asarray(sizes, jnp.int32))
    assert np.abs(np.asarray(y) - expected_groups(x, sizes, exact[2])).max() <= bound(64, "float32")
    assert (np.asarray(y)[sum(sizes) :] == 0).all()


def test_one_of_128_experts():
    """The other experts are never read."""
    weights, exact = matrices("F32", 128, 24, 32)
    poisoned = jnp.full_like(weights, jnp.nan).at[77].set(weights[77])
    sizes = jnp.zeros(128, jnp.int32).at[77].set(9)
    x = rows(9, 32)
    y = np.asarray(grouped_matmul(x, sizes, Matrix.of(poisoned, "F32")))
    assert np.abs(y - np.asarray(x, np.float64) @ exact[77].T).max() <= bound(32, "float32")


def test_temporaries_do_not_grow_with_the_experts():
    def temporaries(experts):
        shapes = (((8, 256), jnp.float32), ((experts,), jnp.int32), ((experts, 64, 144), jnp.uint8))
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        program = jax.jit(lambda x, s, w: grouped_matmul(x, s, Matrix.of(w, "Q4_K"))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(256) <= temporaries(16) + 64 * 256


def test_derivative_of_groups():
    weights, exact = matrices("Q4_0", 4, 40, 64)
    sizes = [3, 0, 17, 2]
    x, dy = rows(24, 64), rows(24, 40)
    _, back = jax.vjp(lambda x: grouped_matmul(x, jnp.asarray(sizes, jnp.int32), Matrix.of(weights, "Q4_0")), x)
    dx = np.asarray(back(dy)[0])
    expected = expected_groups(dy, sizes, exact.transpose(0, 2, 1))
    assert np.abs(dx - expected).max() <= 4 * bound(40, "float32") and (dx[22:] == 0).all()


def test_what_does_not_fit_is_refused():
    weights, _ = matrices("Q4_0", 2, 8, 64)
    with pytest.raises(ValueError, match=r"Q4_0 .* do not fit"):
        quantized_matmul(rows(2, 32), Matrix.of(weights, "Q4_0", (0,)))
    with pytest.raises(ValueError, match="0 indices do not fit"):
        quantized_matmul(rows(2, 64), Matrix.of(weights, "Q4_0"))
    with pytest.raises(ValueError, match="for 3 experts"):
        grouped_matmul(rows(2, 64), jnp.zeros(3, jnp.int32), Matrix.of(weights, "Q4_0"))


def test_the_record_says_what_was_chosen():
    weights, _ = matrices("Q4_0", 8, 64)
    with dispatch.record() as choices:
        quantized_matmul(rows(2, 64), Matrix.of(weights, "Q4_0"))
        quantized_matmul(rows(3, 64), Matrix.of(weights, "Q4_0"))
    assert [(c.operation, c.format, c.backend) for c in choices] == [("quantized_matmul", "Q4_0", "xla")]


@pytest.mark.parametrize(("format", "arithmetic"), [("F32", ""), ("Q5_0", ""), ("Q8_0", "int8x2")])
def test_a_matrix_for_each_head(format, arithmetic):
    """Numbers, bits of a row alone and the derivative; "int8x2" is what the C++ kernels have for single products."""
    weights, exact = matrices(format, 2, 3, 40, 64)
    heads = Matrix.of(weights, format, (1,))
    x, dy = rows(9 * 3, 64).reshape(9, 3, 64), rows(9 * 3, 40).reshape(9, 3, 40)
    product = jax.jit(lambda x: matmul_by_head(x, heads, arithmetic))
    y, right = np.asarray(product(x)), np.einsum("thk,hnk->thn", np.asarray(x, np.float64), exact[1])
    assert y.shape == (9, 3, 40)
    assert np.abs(y - right).max() <= (2e-3 if arithmetic else bound(64, "float32"))
    assert np.array_equal(product(x[4:5])[0], y[4])
    dx = jax.grad(lambda x: (matmul_by_head(x, heads, arithmetic) * dy).sum())(x)
    assert np.abs(dx - np.einsum("thn,hnk->thk", np.asarray(dy, np.float64), exact[1])).max() <= bound(64, "float32")
    with pytest.raises(ValueError, match="do not fit"):
        matmul_by_head(x[:, :2], heads)
