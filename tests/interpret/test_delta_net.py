"""The kernels of the gated delta net, interpreted: tests of tests/unit/kernels, steps with whole chunks, and chunks alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.delta_net import BACKENDS, mosaic_tpu, triton
from pallas_kernels.delta_net.chunks import through_chunk, within_chunk
from unit.kernels import test_delta_net as common

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


def on_gpu(operands, tiled):
    with dispatch.on(dispatch.Target("gpu", "9.0")):
        return triton.delta_net(operands, tiled, interpret=True)


def on_tpu(operands, tiled):
    with dispatch.on(dispatch.Target("tpu", "v5p")):  # where tails are read and written one by one in any step
        return mosaic_tpu.delta_net(operands, tiled, interpret=RACES)


SMALL, WIDE = common.Shape(2, 4, 16, 32, tiled=True), common.Shape(4, 8, 128, 128)
CHUNK = mosaic_tpu.CHUNK
CASES = [pytest.param(on_gpu, SMALL, id="triton"), pytest.param(on_tpu, WIDE, id="mosaic_tpu", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Each program runs once, so XLA need not optimize it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(("backend", "shape"), CASES)
def test_decoding_and_verification(backend, shape):
    """One token each; then several, with the state kept after each that asks for it."""
    common.check_step(shape, backend, ((1, 40, 5), (1, 0, 2), (1, 7, 0), (1, 63, 4)))
    common.test_states_after_tokens_in_between_are_kept_where_asked(backend, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "shape"), CASES)
def test_prefill(backend, shape):
    """Chunks between tokens that are not part of a whole one, next to a token that is decoded."""
    common.check_step(shape, backend, ((1, 40, 5), (140, 0, 2), (9, 60, 0), (128, 64, 3), (70, 30, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "shape"), CASES)
def test_a_state_within_a_chunk_is_kept(backend, shape):
    row, before = common.inputs(shape, 80, 8), common.state_of(shape)
    writes = np.full(80, -1)
    writes[[17, 63, 79]] = 6, 1, 3
    _, after = common.step(shape, backend, before, [(row, 64, 3)], writes=writes)
    _, tails, memories = common.expected(shape, row, *(np.asarray(array)[1, 3] for array in before))
    for t, place in ((17, 6), (63, 1), (79, 3)):
        assert (np.asarray(after.tail)[1, place] == tails[t].astype(np.float32)).all()
        assert np.abs(np.asarray(after.memory)[1, place] - memories[t]).max() <= 2e-5 * max(1, np.abs(memories).max())


@pytest.mark.slow
def test_a_row_does_not_depend_on_cuts_between_chunks():
    """Bit for bit, with XLA's part as on CPUs."""
    kernel = functools.partial(triton.delta_net, interpret=True)
    row = common.inputs(SMALL, 150, 9)
    (whole,), state = common.step(SMALL, kernel, common.state_of(SMALL), [(row, 0, 4)], padding=0)
    pieces, after = [], common.state_of(SMALL)
    for begin, end in ((0, 64), (64, 150)):
        part = common.Inputs(*(array[begin:end] for array in row))
        (found,), after = common.step(SMALL, kernel, after, [(part, begin, 4)], padding=0)
        pieces.append(found)
    assert (np.concatenate(pieces) == whole).all()
    assert all((np.asarray(a)[1, 4] == np.asarray(b)[1, 4]).all() for a, b in zip(after, state, strict=True))


@pytest.mark.parametrize("alike", [False, True])
def test_a_chunk_is_the_walk_over_its_tokens(alike):
    """In float64; also with keys that are all alike, where the powers of a chunk's matrix would be 10^17."""
    rng, width = np.random.default_rng(3), 32
    q, k, v = rng.normal(size=(3, CHUNK, width))
    k = (k[:1] if alike else k) / np.linalg.norm(k[:1] if alike else k, axis=1, keepdims=True) * np.ones((CHUNK, 1))
    log_decay = -rng.exponential(0.003 if alike else 0.3, (CHUNK, 1))
    log_decay[20] = -2000.0  # forgets everything, which must not blur the later decays
    beta = np.ones((CHUNK, 1)) if alike else rng.random((CHUNK, 1))
    memory = rng.normal(size=(width, width))
    q32, k32, v32, *gates, memory32 = (jnp.asarray(array, jnp.float32) for array in (q, k, v, log_decay, beta, memory))
    dot = functools.partial(jnp.dot, precision="highest")
    queries, keys = ([lambda x=x: x[:, :8], lambda x=x: x[:, 8:]] for x in (q32, k32))
    results = []
    told = queries, keys, v32, *gates, *within_chunk(queries, keys, *gates, dot), [memory32[:8], memory32[8:]]
    after = through_chunk(*told, dot, results.append)
    (out,) = results
    for t in range(CHUNK):
        memory = np.exp(log_decay[t]) * memory
        memory = memory + np.outer(k[t], beta[t] * (v[t] - k[t] @ memory))
        assert np.abs(out[t] - q[t] @ memory).max() <= 3e-5 * max(1, np.abs(q[t] @ memory).max())
    assert np.abs(np.concatenate(after) - memory).max() <= 3e-5 * np.abs(memory).max()


def test_what_is_refused():
    refuses = {backend.name: backend.refusal for backend in BACKENDS}

    def case(target, *shape):
        return dispatch.Case("delta_net", target, "F32", "float32", shape=(1, 8192, *shape, 4))

    assert refuses["triton"](case(dispatch.Target("gpu", "9.0"), 32, 128, 128)) is None
    assert "8.0" in refuses["triton"](case(dispatch.Target("gpu", "7.5"), 32, 128, 128))
    assert "48" in refuses["triton"](case(dispatch.Target("gpu", "9.0"), 32, 48, 128))
    assert refuses["mosaic_tpu"](case(dispatch.Target("tpu", "v5e"), 32, 128, 128)) is None
    assert "8n heads" in refuses["mosaic_tpu"](case(dispatch.Target("tpu", "v5e"), 12, 128, 128))
