"""Biases and clamped SwiGLUs of experts against NumPy in float64: in plain XLA, its derivative, and the C++ kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, native
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.grouped_matmul import Biases, Clamp, expert_ffn
from support.compiler import needs_compiler
from unit.kernels.test_native import blocks_of, rows_of

EXPERTS, TOP_K, K, N = 5, 2, 64, 96
CLAMP = Clamp(0.7, 1.702)  # so low that most values are cut


def case(tokens, seed=3):
    """(x, ids, weights, stored matrices, exact ones, biases); the last token is padding."""
    rng = np.random.default_rng(seed)
    stored, exact = zip(
        *(blocks_of("Q8_0", EXPERTS, *shape, seed=i) for i, shape in enumerate([(N, K), (N, K), (K, N)])), strict=True
    )
    biases = Biases(*(rng.normal(0, 0.5, (EXPERTS, size)).astype(np.float32) for size in (N, N, K)))
    ids = rng.integers(0, EXPERTS, (tokens, TOP_K)).astype(np.int32)
    ids[-1] = EXPERTS
    return rows_of(tokens, K), ids, rng.random((tokens, TOP_K)).astype(np.float32), stored, exact, biases


def expected(x, ids, weights, exact, biases, clamp):
    """float64 [tokens, K]."""
    y = np.zeros(x.shape)
    for token, (experts, shares) in enumerate(zip(ids, weights, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            if e == EXPERTS:
                continue
            gate, up = (
                m[e] @ x[token].astype(np.float64) + (b[e] if biases else 0)
                for m, b in zip(exact[:2], biases or [0, 0], strict=False)
            )
            if clamp:
                gate, up = np.minimum(gate, clamp.limit), np.clip(up, -clamp.limit, clamp.limit) + 1
            hidden = gate / (1 + np.exp(-(clamp.alpha if clamp else 1) * gate)) * up
            y[token] += share * (exact[2][e] @ hidden + (biases.down[e] if biases else 0))
    return y


def run(x, ids, weights, stored, biases, clamp, arithmetic=""):
    matrices = [Matrix.of(one, "Q8_0") for one in stored]
    return expert_ffn(x, ids, weights, *matrices, arithmetic, biases=biases, clamp=clamp)


@pytest.mark.parametrize("clamp", [None, CLAMP])
@pytest.mark.parametrize("biased", [False, True])
def test_plain(biased, clamp):
    x, ids, weights, stored, exact, biases = case(20)
    biases = biases if biased else None
    y = np.asarray(jax.jit(run, static_argnums=5)(x, ids, weights, stored, biases, clamp))
    assert np.abs(y - expected(x, ids, weights, exact, biases, clamp)).max() <= 1e-4 and (y[-1] == 0).all()


def test_derivative():
    x, ids, weights, stored, exact, biases = case(3)
    found = jax.grad(lambda x: run(x, ids, weights, stored, biases, CLAMP).sum())(jnp.asarray(x))
    step = np.random.default_rng(0).normal(0, 1e-6, x.shape)
    ends = [expected(x.astype(np.float64) + sign * step, ids, weights, exact, biases, CLAMP).sum() for sign in (1, -1)]
    assert abs((ends[0] - ends[1]) / 2 - (np.asarray(found) * step).sum()) <= 1e-3 * np.abs(np.asarray(found) * step).sum()


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_native(tokens):
    """As close as int8 is, with the bits of each row alone; and a kernel that is chosen, with what it is asked for."""
    x, ids, weights, stored, exact, biases = case(tokens + 1)
    kernel = jax.jit(run, static_argnums=(5, 6))
    with dispatch.record() as choices:
        y = np.asarray(kernel(x, ids, weights, stored, biases, CLAMP, "int8"))
    assert {choice.backend for choice in choices if choice.operation == "expert_ffn"} == {"native"}
    wanted = expected(x, ids, weights, exact, biases, CLAMP)
    assert np.abs(y - wanted).max() <= 0.02 * np.abs(wanted).max() and (y[-1] == 0).all()
    without = np.asarray(kernel(x, ids, weights, stored, None, CLAMP, "int8"))
    assert np.abs(without - wanted).max() > 0.1 * np.abs(wanted).max()
    for row in range(tokens):
        alone = np.asarray(kernel(x[row : row + 1], ids[row : row + 1], weights[row : row + 1], stored, biases, CLAMP, "int8"))
        assert (alone.view(np.uint32) == y[row : row + 1].view(np.uint32)).all()


def test_backends_without_them_are_passed_over_by_name():
    case_of = dispatch.Case(
        "expert_ffn", dispatch.Target("gpu", "9.0"), "Q8_0", "bfloat16", "gpu", (1, N, K), ("clamped SwiGLU",)
    )
    without = dispatch.Backend("plain", lambda case: None, lambda: None)
    assert without.refusal(case_of) == "has no clamped SwiGLU" and "with clamped SwiGLU" in str(case_of)
    assert native.refuses(case_of) == "is for CPUs"


def test_biases_that_do_not_fit_are_refused():
    x, ids, weights, stored, _, biases = case(2)
    with pytest.raises(ValueError, match=r"expert_ffn: biases .* of 5 experts"):
        run(x, ids, weights, stored, biases._replace(down=biases.gate), None)
