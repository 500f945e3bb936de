"""The Triton kernels for compressed matrices, interpreted, against float64 products of the unpacked weights.

The bound is that of the arithmetic (see gpu_tiles.py): a weight n * scale + offset is formed from a rounded scale and a
rounded offset and rounded once more; products are summed in float32 in some order. In float16, which has no room below
2^-14, each rounding also errs by up to 2^-25. Uninitialized memory is NaN in interpret mode, so every bound also says
that the value was written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks
from pallas_kernels.blocks import FORMATS, gpu
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.synthetic import random_blocks
from pallas_kernels.dispatch import Case, Target
from pallas_kernels.grouped_matmul import grouping, triton_grouping
from pallas_kernels.grouped_matmul import triton as grouped
from pallas_kernels.grouped_matmul.parts import Biases, Clamp
from pallas_kernels.quantized_matmul import BACKENDS
from pallas_kernels.quantized_matmul import triton as dense

HOPPER = Target("gpu", "9.0")
ROUNDING = {"bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25)}
SUM = 2.0**-24
CLAMP = Clamp(limit=0.5, alpha=1.702)

pack = jax.jit(gpu.pack, static_argnums=1)
scales_of = jax.jit(gpu._scales, static_argnums=0)
unpack = jax.jit(blocks.unpack, static_argnums=1)


def weights_and_bound(stored, planes, format, dtype):
    """float64 weights [rows, k] and how far the kernel's may be from them."""
    packing = gpu.PACKINGS[format]
    rows, k = stored.shape[0], stored.shape[1] // FORMATS[format].block_bytes * FORMATS[format].block_size
    w = np.asarray(unpack(stored, format), np.float64)
    unit, least = ROUNDING[dtype]
    offset = np.zeros((rows, k // 64, 4))
    if packing.scale != "powers":
        scale, minimum = scales_of(packing.scale, planes[2:] if 4 < packing.bits < 8 else planes[1:])
        shift = 128 if packing.levels else packing.offset
        offset = -shift * np.asarray(scale, np.float64) if minimum is None else np.asarray(minimum, np.float64)
    offset = np.repeat(offset.reshape(rows, -1), 16, 1)
    relative = unit * (np.abs(w - offset) + np.abs(offset) + np.abs(w))
    return w, 1.01 * relative + least * (2 ** (8 if packing.levels else packing.bits) + 1)


class Weights:
    """One matrix or a stack of experts, with everything that must not be read poisoned: other layers, other experts."""

    def __init__(self, rng, format, n, k, dtype, experts=None, chosen=()):
        count = 1 if experts is None else experts
        stored = random_blocks(format, count * n, k, rng, 0.3).reshape(count, n, -1)
        planes = [pack(one, format) for one in stored]
        found = [weights_and_bound(one, own, format, dtype) for one, own in zip(stored, planes, strict=True)]
        self.w, self.bound = (np.stack(part) for part in zip(*found, strict=True))
        stacked = [np.stack(part) for part in zip(*planes, strict=True)]
        for expert in set(range(count)) - set(chosen) if experts is not None else ():
            for plane in stacked[1:]:
                plane[expert] = 0x7E00 if plane.dtype == np.uint16 else 0x7E007E00
        if experts is None:
            stacked = [part[0] for part in stacked]
        stacks = tuple(jnp.asarray(np.stack([np.full_like(part, 0x7E), part])) for part in stacked)
        self.matrix = Matrix(stacks, (), format, "gpu", n, k).at(1)

    def product(self, x, error=0.0, expert=0):
        """x [m, k] float64 with an error of at most `error`, times the matrix: the product and its bound."""
        w, bound = self.w[expert], self.bound[expert]
        most = np.abs(x) + error
        exact = x @ w.T
        return exact, most @ bound.T + error * np.ones_like(x) @ np.abs(w).T + x.shape[1] * SUM * (most @ (np.abs(w) + bound).T)


def silu_product(gate, up, dtype, clamp=None):
    """SwiGLU of two (value, bound) pairs, rounded to `dtype`."""
    (g, g_error), (u, u_error) = gate, up
    if clamp is not None:
        g, u = np.minimum(g, clamp.limit), np.clip(u, -clamp.limit, clamp.limit) + 1
    silu = g / (1 + np.exp(-(clamp.alpha if clamp else 1) * g))
    silu_error = 1.1 * g_error + 1e-6 * np.abs(silu)
    error = silu_error * (np.abs(u) + u_error) + np.abs(silu) * u_error
    unit, least = ROUNDING[dtype]
    return silu * u, error + 1.01 * unit * (np.abs(silu * u) + error) + least


def biased(product, bias):
    """A (value, bound) pair and a bias."""
    exact, error = product
    return exact + bias, error + SUM * (np.abs(exact) + error + np.abs(bias))


def activations(rng, m, k, dtype):
    return jnp.asarray(rng.normal(size=(m, k)), dtype)


def assert_within(found, expected):
    exact, bound = expected
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_format_in_one_launch(dtype):
    rng = np.random.default_rng(1)
    weights = [Weights(rng, format, 16 + 8 * i, 512, dtype) for i, format in enumerate(gpu.PACKINGS)]
    x = activations(rng, 3, 512, dtype)
    found = dense.matmuls(x, [w.matrix for w in weights], HOPPER, interpret=True)
    for y, w in zip(found, weights, strict=True):
        assert_within(y, w.product(np.asarray(x, np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("k", [192, 128])
def test_rows_that_are_no_multiple_of_256(k):
    rng = np.random.default_rng(k)
    formats = [format for format in gpu.PACKINGS if gpu.fits(format, 16, k) is None]
    assert len(formats) == 7
    weights = [Weights(rng, format, 24, k, "bfloat16") for format in formats]
    x = activations(rng, 2, k, "bfloat16")
    for y, w in zip(dense.matmuls(x, [w.matrix for w in weights], HOPPER, interpret=True), weights, strict=True):
        assert_within(y, w.product(np.asarray(x, np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 200), (40, 72), (130, 264)])
def test_every_tile(m, n):
    rng = np.random.default_rng(m)
    w = Weights(rng, "Q4_K", n, 256, "bfloat16")
    x = activations(rng, m, 256, "bfloat16")
    assert_within(dense.matmul(x, w.matrix, HOPPER, interpret=True), w.product(np.asarray(x, np.float64)))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_swiglu(dtype):
    rng = np.random.default_rng(3)
    gate, up = Weights(rng, "Q5_K", 40, 256, dtype), Weights(rng, "Q6_K", 40, 256, dtype)
    x = activations(rng, 5, 256, dtype)
    found = dense.swiglu(x, gate.matrix, up.matrix, HOPPER, interpret=True)
    assert found.dtype == x.dtype
    exact = np.asarray(x, np.float64)
    assert_within(found, silu_product(gate.product(exact), up.product(exact), dtype))


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(4)
    w = Weights(rng, "Q4_K", 32, 512, "bfloat16")
    x = activations(rng, 8, 512, "bfloat16")
    together = dense.matmul(x, w.matrix, HOPPER, interpret=True)
    alone = dense.matmul(x[3:4], w.matrix, HOPPER, interpret=True)
    np.testing.assert_array_equal(together[3], alone[0])


@pytest.mark.parametrize("sizes", [[3, 0, 9, 0, 1], [0, 0, 0, 0, 20], [0, 0, 0, 0, 0]])
def test_grouped(sizes):
    rng = np.random.default_rng(5)
    rows, experts = 20, len(sizes)
    w = Weights(rng, "Q4_K", 40, 256, "bfloat16", experts, chosen=np.flatnonzero(sizes))
    x = activations(rng, rows, 256, "bfloat16")
    found = np.asarray(grouped.grouped(x, jnp.asarray(sizes, jnp.int32), w.matrix, HOPPER, interpret=True))
    ends = np.cumsum(sizes)
    for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        if size:
            assert_within(found[end - size : end], w.product(np.asarray(x, np.float64)[end - size : end], expert=expert))
    assert np.all(found[ends[-1] :] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "dtype", "clamp"),
    [
        (1, 128, 8, "bfloat16", None),
        (9, 6, 3, "float16", None),
        (5, 1, 1, "bfloat16", None),
        (140, 4, 2, "bfloat16", None),
        (1, 5, 2, "bfloat16", CLAMP),
        (9, 6, 3, "float16", CLAMP),
    ],
)
def test_expert_ffn(tokens, experts, top_k, dtype, clamp):
    """With a clamp, with biases as well."""
    rng = np.random.default_rng(tokens)
    n, k = 64, 256
    ids = np.array([rng.permutation(experts + 1)[:top_k] for _ in range(tokens)], np.int32)  # the last id means no expert
    make = functools.partial(Weights, rng, dtype=dtype, experts=experts, chosen=np.unique(ids))
    gate, up, down = make("Q4_K", n, k), make("Q4_K", n, k), make("Q8_0", k, n)
    x = activations(rng, tokens, k, dtype) * 0.1
    weights = rng.random((tokens, top_k)).astype(np.float32)
    biases = Biases(*(rng.normal(0, 0.5 if clamp else 0, (experts, m)).astype(np.float32) for m in (n, n, k)))
    for_kernel = jax.tree.map(jnp.asarray, biases) if clamp else None
    function = jax.jit(lambda *args: grouped.expert_ffn(*args, HOPPER, for_kernel, clamp, interpret=True))
    found = function(x, jnp.asarray(ids), jnp.asarray(weights), gate.matrix, up.matrix, down.matrix)

    exact, bound = np.zeros((tokens, k)), np.zeros((tokens, k))
    for token, slot in np.argwhere(ids < experts):
        row, expert = np.asarray(x, np.float64)[token : token + 1], ids[token, slot]
        of_gate = biased(gate.product(row, expert=expert), biases.gate[expert])
        of_up = biased(up.product(row, expert=expert), biases.up[expert])
        hidden, error = silu_product(of_gate, of_up, dtype, clamp)
        y, y_error = biased(down.product(hidden, error, expert), biases.down[expert])
        exact[token] += weights[token, slot] * y[0]
        bound[token] += weights[token, slot] * (y_error[0] + 4 * top_k * SUM * np.abs(y[0]))
    assert_within(found, (exact, bound))


@pytest.mark.parametrize(("count", "experts", "rows"), [(1, 1, 8), (8, 128, 8), (100, 5, 16), (256, 128, 8)])
def test_grouping_in_one_launch(count, experts, rows):
    ids = jnp.asarray(np.random.default_rng(count).integers(0, experts + 1, count), jnp.int32)
    expected = grouping.group(ids, experts, rows)
    order, found = triton_grouping.group(ids, experts, rows, interpret=True)
    np.testing.assert_array_equal(order, expected.order)
    used = int(expected.num_tiles)
    assert int(found.num_tiles) == used
    for name in ("tile_expert", "tile_start", "tile_rows"):
        np.testing.assert_array_equal(getattr(found, name)[:used], getattr(expected, name)[:used])


@pytest.mark.parametrize("format", gpu.PACKINGS)
@pytest.mark.parametrize("k", [192, 512])
def test_layout(format, k):
    if gpu.fits(format, 6, k) is not None:
        assert k % 256
        return

    @jax.jit
    def everything(stored):
        planes = gpu.pack(stored, format)
        stacks = tuple(jnp.stack([jnp.zeros_like(p), p]) for p in planes)
        part = gpu.rows(stacks, (jnp.int32(1),), jnp.int32(2), 3)
        picked = gpu.gather(planes, jnp.array([5, 0], jnp.int32))
        decoded = [gpu.decode(some, format, some[0].shape[0], k) for some in (planes, part, picked)]
        return planes, blocks.unpack(stored, format), decoded

    stored = random_blocks(format, 6, k, np.random.default_rng(7), 0.5)
    planes, exact, (decoded, part, picked) = everything(stored)
    assert [(p.shape, p.dtype) for p in planes] == [(s.shape, s.dtype) for s in gpu.plane_shapes(format, 6, k)]
    assert sum(p.nbytes for p in planes) == stored.nbytes
    exact = np.asarray(exact).view(np.uint32)
    for found, rows in ((decoded, slice(None)), (part, slice(2, 5)), (picked, [5, 0])):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), exact[rows])


@pytest.mark.parametrize("k", [64, 128, 256, 320, 768])
def test_order(k):
    columns = jnp.arange(k)
    np.testing.assert_array_equal(jnp.zeros(k, jnp.int32).at[gpu.place_of(columns, k)].set(columns), gpu.ordered(columns))


def test_what_is_refused():
    good = Case("quantized_matmul", HOPPER, "Q4_K", "bfloat16", "gpu", (1, 16, 256))
    refuses = {backend.name: backend.refuses for backend in BACKENDS}["triton"]
    assert refuses(good) is None

    def why(**changes):
        return refuses(Case(**{**vars(good), **changes}))

    assert "7.5" in why(target=Target("gpu", "7.5"))
    assert "NVIDIA" in why(target=Target("cpu"))
    assert "float32" in why(dtype="float32")
    assert "ggml" in why(memory_layout="ggml")
    assert "not a multiple of 256" in gpu.fits("Q4_K", 16, 128)
    assert "IQ2_XXS" in gpu.fits("IQ2_XXS", 16, 256)
