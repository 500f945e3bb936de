"""The gated delta net of a chunk of tokens at once (arXiv 2412.06464): products of matrices in place of a walk over the tokens.

With D(i, j) = exp(the sum of log_decay from j + 1 to i) and D(i) the same from the beginning of the chunk on, the corrections u
of its tokens and what they read are

    u = (1 + strictly lower part of beta D k kᵀ)⁻¹ beta (v - D(i) k M),    result = D(i) q M + lower part of (D q kᵀ) u,

and M becomes D(last) M + kᵀ (D(last, i) u). Exponents are sums of numbers of one sign, never differences, so nothing cancels.
The inverse is found by halves: the inverse of (A 0; C B) has -B⁻¹ C A⁻¹ below A⁻¹ and B⁻¹, for all blocks of a size at once,
which for 64 tokens is five pairs of products. (The powers of the matrix would do too, but they can be as large as 10¹⁷.)

With heads of 128, a token costs 4 C (dk + dv) + 6 dk dv operations a head and some 22 C² for the inverse: 254 k in a chunk of
64, 154 k in one of 32. The walk costs 7 dk dv (115 k) but has no products of matrices, and each of its steps waits for the one
before.

Queries, keys and the memory come in pieces along dk, queries and keys as functions that load one: a GPU's registers do not hold
all of them next to a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_net.parts import Sequences

Product = Callable[[jax.Array, jax.Array], jax.Array]  # of two matrices, float32
Pieces = Sequence[Callable[[], jax.Array]]  # along dk


def within_chunk(q: Pieces, k: Pieces, log_decay: jax.Array, beta: jax.Array, dot: Product) -> tuple[jax.Array, jax.Array]:
    """What does not depend on the memory, both [C, C]: the inverse, and the lower part of D q kᵀ.

    q, k [C, dk], log_decay, beta [C, 1] of C tokens, a power of two.
    """
    size = log_decay.shape[0]
    row, column = _iota(size, 0), _iota(size, 1)
    until = jnp.where(column <= row, _along(log_decay), 0.0)
    decay = jnp.exp(dot(until, (row > column).astype(jnp.float32)))  # D(i, j) for j <= i
    seen = jnp.where(row >= column, decay * _sum(dot(a(), b().T) for a, b in zip(q, k, strict=True)), 0.0)
    lower = beta * decay * _sum(dot(a(), a().T) for a in k)
    inverse = (row == column).astype(jnp.float32)
    half = 1
    while half < size:
        within = (row // (2 * half) == column // (2 * half)) & (row // half > column // half)
        below = jnp.where(within, lower, 0.0)
        inverse = inverse - (below if half == 1 else dot(dot(inverse, below), inverse))
        half *= 2
    return inverse, seen


def through_chunk(
    q: Pieces,
    k: Pieces,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    inverse: jax.Array,
    seen: jax.Array,
    memory: Sequence[jax.Array],
    dot: Product,
    give: Callable[[jax.Array], None],
) -> list[jax.Array]:
    """The memory [dk, dv] after C tokens; their results [C, dv] go to `give`.

    v [C, dv]: the values; inverse, seen: of `within_chunk`; memory: before them. dv: any of the columns.
    """
    size = log_decay.shape[0]
    row, column, along = _iota(size, 0), _iota(size, 1), _along(log_decay)
    since = jnp.exp(jnp.sum(jnp.where(column <= row, along, 0.0), axis=1, keepdims=True))  # D(i)
    after = jnp.exp(jnp.sum(jnp.where(column > row, along, 0.0), axis=1, keepdims=True))  # D(last, i)
    read, known = (_sum(dot(a(), b) for a, b in zip(x, memory, strict=True)) for x in (q, k))
    wrong = dot(inverse, beta * (v - since * known))
    give(since * read + dot(seen, wrong))
    left, wrong = jnp.exp(jnp.sum(log_decay)), after * wrong
    return [left * b + dot(a().T, wrong) for a, b in zip(k, memory, strict=True)]


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _iota(size: int, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (size, size), axis)


def _along(column: jax.Array) -> jax.Array:
    """[C, 1] as [1, C], by sums: kernels for TPUs and GPUs have these everywhere."""
    size = column.shape[0]
    return jnp.sum(jnp.where(_iota(size, 0) == _iota(size, 1), column, 0.0), axis=0, keepdims=True)


def whole_chunks(sequences: Sequences, row: jax.Array, size: int) -> jax.Array:
    """int32 [tokens]: 1 where a chunk begins that may be taken at once: it begins at a multiple of `size` positions, all of it
    is in the step, and no state in between is kept. row: the sequence of each token."""
    starts, positions, writes = sequences.starts, sequences.positions, sequences.writes
    tokens = positions.shape[0]
    last = jnp.arange(tokens, dtype=jnp.int32) + size - 1
    kept = jnp.cumsum((writes >= 0).astype(jnp.int32))
    between = kept[jnp.minimum(last - 1, tokens - 1)] - kept + (writes >= 0)
    return ((positions % size == 0) & (last < starts[row + 1]) & (between == 0)).astype(jnp.int32)
