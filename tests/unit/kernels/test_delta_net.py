"""The gated delta net against its float64 reference: ragged batches, places of states, derivatives, and that a row's bits do
not depend on how its sequence was cut or on the rest of the batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.delta_net import DeltaState, Sequences, delta_net, reference
from pallas_kernels.delta_net.parts import Operands
from support.compiler import needs_compiler

BACKENDS = [pytest.param("xla"), pytest.param("native", marks=needs_compiler)]
LAYERS, PLACES = 3, 7


@dataclasses.dataclass(frozen=True)
class Shape:
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    tiled: bool = False

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


SHAPES = [Shape(2, 6, 16, 16), Shape(2, 4, 32, 32, tiled=True), Shape(3, 3, 8, 24, taps=3), Shape(1, 2, 128, 128)]


class Inputs(NamedTuple):
    qkv: np.ndarray
    log_decay: np.ndarray
    beta: np.ndarray


# Heads of 16n, which all backends take, but for one.
CASES = [(shape, *backend.values, backend.marks) for shape in SHAPES for backend in BACKENDS]
CASES = [pytest.param(shape, name, marks=marks) for shape, name, marks in CASES if name == "xla" or shape.key_dim % 16 == 0]


def inputs(shape: Shape, tokens: int, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    decay = -rng.exponential(0.3, (tokens, shape.value_heads))
    beta = 1 / (1 + np.exp(-rng.normal(0, 2, decay.shape)))
    made = rng.normal(0, 2, (tokens, shape.channels)), decay, beta
    return Inputs(*(array.astype(np.float32) for array in made))


def taps_of(shape: Shape) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.6, (shape.channels, shape.taps)).astype(np.float32)


def state_of(shape: Shape) -> DeltaState:
    """Something at every place, so that a read of a wrong one shows."""
    rng = np.random.default_rng(2)
    tail = rng.normal(0, 2, (LAYERS, PLACES, shape.taps - 1, shape.channels))
    memory = rng.normal(0, 1, (LAYERS, PLACES, shape.value_heads, shape.key_dim, shape.value_dim))
    return DeltaState(jnp.asarray(tail, jnp.float32), jnp.asarray(memory, jnp.float32))


@functools.partial(jax.jit, static_argnames=("tiled", "backend"))
def run(made, taps, state, layer, sequences, *, tiled, backend):
    """backend: its name, or its function (tests/interpret)."""
    if callable(backend):
        return backend(Operands(*made, taps, state, layer, sequences), tiled)
    return delta_net(*made, taps, state, layer, sequences, tiled=tiled, implementation=backend)


def step(shape, backend, state, rows, layer=1, padding=3, writes=None):
    """One step of rows (inputs, the first's position, place): what it gives of each row, and the state."""
    lengths = [len(row.qkv) for row, *_ in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    kept = np.full(starts[-1] + padding, -1, np.int32)
    for (_, _, place), end in zip(rows, starts[1:], strict=True):
        kept[end - 1] = place
    positions = np.concatenate([first + np.arange(len(row.qkv)) for row, first, _ in rows] + [np.zeros(padding)])
    sequences = Sequences(
        starts,
        positions.astype(np.int32),
        np.array([first == 0 for _, first, _ in rows]),
        np.array([place for *_, place in rows], np.int32),
        kept if writes is None else np.concatenate([writes, kept[starts[-1] :]]).astype(np.int32),
    )
    made = [np.concatenate([*parts, np.ones((padding, *parts[0].shape[1:]), np.float32)])
            for parts in zip(*(row for row, *_ in rows), strict=True)]  # fmt: skip
    out, state = run(Inputs(*made), taps_of(shape), state, layer, sequences, tiled=shape.tiled, backend=backend)
    out = np.asarray(out)
    assert (out[starts[-1] :] == 0).all()
    return [out[a:b] for a, b in itertools.pairwise(starts)], state


def expected(shape, row, tail, memory):
    return reference.delta_net(*row, taps_of(shape), tail, memory, tiled=shape.tiled)


@pytest.mark.parametrize(("shape", "backend"), CASES, ids=str)
def test_a_ragged_step_is_the_reference(shape, backend):
    check_step(shape, backend, ((1, 40, 5), (37, 0, 2), (9, 17, 0), (1, 0, 3)))


def check_step(shape, backend, places):
    """places: of each sequence, its tokens, the first one's position and the place of its state."""
    before = state_of(shape)
    rows = [(inputs(shape, tokens, seed), first, place) for seed, (tokens, first, place) in enumerate(places)]
    found, after = step(shape, backend, before, rows)
    changed = np.array(before.tail), np.array(before.memory)
    for (row, first, place), y in zip(rows, found, strict=True):
        start = [np.asarray(array)[1, place] * (first > 0) for array in before]
        right, tails, memories = expected(shape, row, *start)
        # Sums of dk products, in float32, of values of a few units; errors decay with the memory.
        assert np.abs(y - right).max() <= 2e-5 * max(1, np.abs(right).max())
        assert np.abs(np.asarray(after.memory)[1, place] - memories[-1]).max() <= 2e-5 * max(1, np.abs(memories).max())
        assert (np.asarray(after.tail)[1, place] == tails[-1].astype(np.float32)).all()
        for array, new in zip(changed, after, strict=True):
            array[1, place] = np.asarray(new)[1, place]
    assert all((array == np.asarray(new)).all() for array, new in zip(changed, after, strict=True))  # and nothing else


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_after_tokens_in_between_are_kept_where_asked(backend, shape=SHAPES[0]):
    before, row = state_of(shape), inputs(shape, 4, 8)
    _, after = step(shape, backend, before, [(row, 12, 3)], writes=np.array([6, -1, 3, 1]))
    _, tails, memories = expected(shape, row, *(np.asarray(array)[1, 3] for array in before))
    for t, place in ((0, 6), (2, 3), (3, 1)):
        assert (np.asarray(after.tail)[1, place] == tails[t].astype(np.float32)).all()
        assert np.abs(np.asarray(after.memory)[1, place] - memories[t]).max() <= 2e-5 * max(1, np.abs(memories).max())


@pytest.mark.parametrize(("shape", "backend"), CASES, ids=str)
def test_a_row_has_the_same_bits_however_it_was_cut_and_batched(shape, backend):
    whole, other = inputs(shape, 70, 9), inputs(shape, 21, 10)
    (alone,), state = step(shape, backend, state_of(shape), [(whole, 0, 4)], padding=0)
    ended = [np.asarray(array)[1, 4] for array in state]
    for cuts in ([1, 2, 66, 69], [64], [17, 18, 19, 40], list(range(1, 70))):
        state, pieces, begin = state_of(shape), [], 0
        for end in [*cuts, 70]:
            part = Inputs(*(array[begin:end] for array in whole))
            rows = [(part, begin, 4)] if begin % 2 else [(other, 0, 1), (part, begin, 4), (inputs(shape, 1, end), 5, 2)]
            found, state = step(shape, backend, state, rows, padding=begin % 3)
            pieces.append(found[0 if begin % 2 else 1])
            begin = end
        assert (np.concatenate(pieces) == alone).all(), cuts
        assert all((np.asarray(array)[1, 4] == right).all() for array, right in zip(state, ended, strict=True)), cuts


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_are_those_of_the_reference(backend):
    shape, state = SHAPES[0], state_of(SHAPES[0])
    made = [jnp.asarray(array) for array in inputs(shape, 12, 11)]
    taps, rng = jnp.asarray(taps_of(shape)), np.random.default_rng(12)
    starts, begins, reads = np.array([0, 7, 11]), np.array([True, False]), np.array([1, 4])
    sequences = Sequences(starts, np.arange(12), begins, reads, np.full(12, -1))
    weights = rng.normal(0, 1, (12, shape.value_heads, shape.value_dim)).astype(np.float32)

    def loss(qkv, log_decay, beta, taps):
        out, _ = delta_net(qkv, log_decay, beta, taps, state, 1, sequences, implementation=backend)
        return (out * weights).sum()

    def right(*arrays):
        arrays, total = [np.asarray(array, np.float64) for array in arrays], 0.0
        for a, b, kept in ((0, 7, [np.zeros(array.shape[2:]) for array in state]), (7, 11, [array[1, 4] for array in state])):
            total += (reference.delta_net(*(x[a:b] for x in arrays[:3]), arrays[3], *kept)[0] * weights[a:b]).sum()
        return total

    arrays = [*made, taps]
    for i, gradient in enumerate(jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)):
        way, slope = rng.normal(0, 1, arrays[i].shape), 0.0
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) + sign * 1e-5 * way if j == i else x for j, x in enumerate(arrays)]
            slope += sign * right(*moved) / 2e-5
        assert abs((np.asarray(gradient, np.float64) * way).sum() - slope) <= 1e-3 * max(1, abs(slope))


@needs_compiler
def test_heads_that_are_not_of_16n_go_elsewhere():
    shape = SHAPES[2]
    with dispatch.record() as choices:
        step(shape, None, state_of(shape), [(inputs(shape, 2, 1), 0, 1)])
    (choice,) = choices
    assert choice.backend == "xla" and "16n" in choice.reason


def test_what_does_not_fit_is_refused():
    shape = SHAPES[0]
    with pytest.raises(ValueError, match="delta_net: qkv, log_decay, beta, taps, tail and memory"):
        delta_net(*inputs(SHAPES[1], 3, 1), taps_of(shape), state_of(shape), 0, None)
