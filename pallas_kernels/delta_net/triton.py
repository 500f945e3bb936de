"""The gated delta net on NVIDIA GPUs (Triton lowering): one program per sequence, head and some columns of its memory.

Columns of a memory do not need each other. A program reads its part of the memory once, keeps it in registers while it walks
over the tokens of its sequence, and writes it where it is to be kept; so a decoded token moves the bytes of the memory twice,
which nothing can avoid. 32 columns of 128 x 4 bytes are 16 KB, 32 registers of each of 128 threads; one sequence of 32 heads of
128 x 128 is 128 programs.

Where a whole chunk begins (chunks.py), a step of the walk is a chunk. What its rows need of each other was computed for all
chunks at once by a kernel before, which leaves five products on tensor cores. Chunks of 32 and 16 columns are what fits into
registers: compiled for an H200, 64 tokens, 32 columns or products in TF32 spill. Steps of less than a chunk use a kernel
that does not have this branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.delta_net.chunks import through_chunk, whole_chunks, within_chunk
from pallas_kernels.delta_net.mixing import Mixed, mixed, row_of
from pallas_kernels.delta_net.parts import DeltaState, Operands
from pallas_kernels.dispatch import Case

CHUNK = 32
_PIECE = 32  # keys whose rows of the memory are one value


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.target.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {case.target}"
    *_, key_dim, value_dim, _ = case.shape
    if any(width not in (16, 32, 64, 128) for width in (key_dim, value_dim)):
        return f"heads of {key_dim} keys and {value_dim} values; 16, 32, 64 or 128 only"
    return None


def delta_net(operands: Operands, tiled: bool, interpret: bool = False) -> tuple[jax.Array, DeltaState]:
    """As the package's contract says."""
    given, tail = mixed(operands, tiled)
    sequences, memory = operands.sequences, operands.state.memory
    places, heads, key_dim, value_dim = memory.shape[1:]
    tokens, layer = given.q.shape[0], jnp.asarray(operands.layer, jnp.int32)
    tables = [sequences.starts, sequences.begins.astype(jnp.int32), sequences.reads, sequences.writes, layer.reshape(1)]
    chunked, width = tokens >= CHUNK, min(value_dim, 16 if tokens >= CHUNK else 32)
    if chunked:
        row = row_of(sequences.starts, tokens)
        whole = whole_chunks(sequences, row, CHUNK)
        tables += [whole, *_within(given, whole, interpret)]

    def kernel(q: Any, k: Any, v: Any, log_decay: Any, beta: Any, *refs: Any) -> None:
        starts, begins, reads, writes, layer, *of_chunks, _before, out, memory = refs
        sequence, head = pl.program_id(0), pl.program_id(1)
        columns = pl.program_id(2) * width + lax.iota(jnp.int32, width)

        def places_of(number: Any) -> list[Any]:
            at = layer[0] * places + number
            return [memory.at[at, head, rows[:, None], columns[None]] for rows in _pieces(key_dim)]

        def keep(number: Any, value: Any) -> None:
            @pl.when(number >= 0)
            def _() -> None:
                for place, piece in zip(places_of(number), value, strict=True):
                    compat.triton_store(place, piece)

        def token(t: Any, value: Any) -> Any:
            query, key = ([compat.triton_load(x.at[t, head, rows])[:, None] for rows in _pieces(key_dim)] for x in (q, k))
            value = [piece * jnp.exp(log_decay[t, head]) for piece in value]
            found = functools.reduce(jnp.add, (jnp.sum(a * b, axis=0) for a, b in zip(key, value, strict=True)))
            wrong = beta[t, head] * (compat.triton_load(v.at[t, head, columns]) - found)
            value = [piece + a * wrong[None] for a, piece in zip(key, value, strict=True)]
            result = functools.reduce(jnp.add, (jnp.sum(a * b, axis=0) for a, b in zip(query, value, strict=True)))
            compat.triton_store(out.at[t, head, columns], result)
            keep(writes[t], value)
            return value

        def chunk(t: Any, value: Any) -> Any:
            inverse, seen = (_of_chunk(square, t, head, lax.iota(jnp.int32, CHUNK)) for square in of_chunks[1:])
            queries, keys = _keys_of_chunk(t, head, q, k)
            values, gates = _of_chunk(v, t, head, columns), _gates_of_chunk(t, head, log_decay, beta)

            def give(result: Any) -> None:
                compat.triton_store(_rows(out, t, head, columns), result)

            value = through_chunk(queries, keys, values, *gates, inverse, seen, value, _dot, give)
            keep(writes[t + CHUNK - 1], value)
            return value

        start, end = starts[sequence], starts[sequence + 1]
        before = places_of(reads[sequence])
        known = jnp.broadcast_to((begins[sequence] == 0) & (start < end), (key_dim // len(before), width))
        value = [compat.triton_load(place, mask=known, other=0.0) for place in before]
        if not chunked:
            lax.fori_loop(start, end, token, value)
            return

        def step(carry: Any) -> Any:
            t, value = carry
            at_once = of_chunks[0][t]
            return t + 1 + (CHUNK - 1) * at_once, lax.cond(at_once != 0, chunk, token, t, value)

        lax.while_loop(lambda carry: carry[0] < end, step, (start, value))

    flat = memory.reshape(-1, *memory.shape[2:])
    inputs = (*given, *tables)
    out, flat = compat.triton_call(
        kernel,
        name="delta_net_chunks" if chunked else "delta_net",
        grid=(sequences.reads.shape[0], heads, value_dim // width),
        out_shape=[jax.ShapeDtypeStruct(given.v.shape, jnp.float32), jax.ShapeDtypeStruct(flat.shape, jnp.float32)],
        input_output_aliases={len(inputs): 1},
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )(*inputs, flat)
    live = jnp.arange(tokens) < sequences.starts[-1]
    return jnp.where(live[:, None, None], out, 0.0), DeltaState(tail, flat.reshape(memory.shape))


def _within(given: Mixed, whole: jax.Array, interpret: bool) -> list[jax.Array]:
    """`within_chunk` of each chunk, [tokens, H, CHUNK] each: at a token, its row. Tokens of no whole chunk have none.

    A program per head and run of CHUNK tokens, in which at most one chunk begins.
    """
    tokens, heads, _ = given.q.shape

    def kernel(q: Any, k: Any, _v: Any, log_decay: Any, beta: Any, whole: Any, *squares: Any) -> None:
        at, head = pl.program_id(0) * CHUNK + lax.iota(jnp.int32, CHUNK), pl.program_id(1)
        begins = compat.triton_load(whole.at[at], mask=at < tokens, other=0)
        first = jnp.max(jnp.where(begins != 0, at, -1))

        @pl.when(first >= 0)
        def _() -> None:
            queries, keys = _keys_of_chunk(first, head, q, k)
            found = within_chunk(queries, keys, *_gates_of_chunk(first, head, log_decay, beta), _dot)
            for square, values in zip(squares, found, strict=True):
                compat.triton_store(_rows(square, first, head, lax.iota(jnp.int32, CHUNK)), values)

    square = jax.ShapeDtypeStruct((tokens, heads, CHUNK), jnp.float32)
    return compat.triton_call(
        kernel,
        name="delta_net_within_chunks",
        grid=(-(-tokens // CHUNK), heads),
        out_shape=[square, square],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )(*given, whole)


def _pieces(key_dim: int) -> list[jax.Array]:
    """The keys of each piece."""
    size = min(_PIECE, key_dim)
    return [first + lax.iota(jnp.int32, size) for first in range(0, key_dim, size)]


def _rows(ref: Any, first: Any, head: Any, columns: Any) -> Any:
    """The place of a chunk's rows of a head in [tokens, H, ...]."""
    return ref.at[(first + lax.iota(jnp.int32, CHUNK))[:, None], head, columns[None]]


def _of_chunk(ref: Any, first: Any, head: Any, columns: Any) -> jax.Array:
    return compat.triton_load(_rows(ref, first, head, columns))


def _keys_of_chunk(first: Any, head: Any, *refs: Any) -> list[list[Callable[[], jax.Array]]]:
    """Functions that load the pieces [CHUNK, keys] of each array."""
    return [[functools.partial(_of_chunk, ref, first, head, keys) for keys in _pieces(ref.shape[2])] for ref in refs]


def _gates_of_chunk(first: Any, head: Any, log_decay: Any, beta: Any) -> tuple[jax.Array, jax.Array]:
    """[CHUNK, 1] each."""
    at = first + lax.iota(jnp.int32, CHUNK), jnp.full((CHUNK,), head)
    return compat.triton_load(log_decay.at[at])[:, None], compat.triton_load(beta.at[at])[:, None]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """On tensor cores: each operand as the sum of two bfloat16 numbers, without the product of the smaller ones (2^-16)."""

    def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = x.astype(jnp.bfloat16)
        return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)

    (a, rest_a), (b, rest_b) = parts(a), parts(b)
    pairs = (rest_a, b), (a, rest_b), (a, b)
    return functools.reduce(jnp.add, (jnp.dot(x, y, preferred_element_type=jnp.float32) for x, y in pairs))
