"""The gated delta net on TPU: a step of the grid takes the tokens of one sequence between two multiples of 64 positions.

The grid is (blocks of 8 heads, items); its second bound is the number of items that the batch has. The memories of a sequence
stay in VMEM from item to item: 8 heads of 128 x 128 are 512 KB, in two copies, so that one can leave while the next item
computes. The pipeline reads those that begin a sequence (another two copies), the kernel writes those that are kept to their
places, and results to their tokens, row by row. Four arrays of 64 rows of 8 heads, two results: 3 MiB more.

A whole item of 64 tokens is one chunk (chunks.py). Any other walks over its tokens on the vector unit: queries and keys are
turned into columns once for 8 heads, and a head takes 16 registers of memory, 130 operations. At decode an item has 1 row: the
memories' bytes in and out take 1,920 cycles of a v5e, the step 1,540 bundles.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_net.chunks import through_chunk, whole_chunks, within_chunk
from pallas_kernels.delta_net.mixing import mixed, row_of
from pallas_kernels.delta_net.parts import DeltaState, Operands, Sequences
from pallas_kernels.dispatch import Case

CHUNK = 64
HEADS = 8  # of a block: the sublanes of a register
_FEW = 8  # rows of an item if no chunk fits into the step
_CONTINUES, _READS, _BEGINS = range(3)  # where an item's memories come from


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    *_, heads, key_dim, value_dim, _ = case.shape
    if heads % HEADS or key_dim != 128 or value_dim != 128:
        return f"{heads} heads of {key_dim} keys and {value_dim} values; 8n heads of 128 and 128 only"
    return None


class Items(NamedTuple):
    """Runs of tokens of one sequence, in their order. int32 [items] each; those from `total` on are to be ignored.

    start, rows: the tokens; whole: 1 if they are a chunk; source: _CONTINUES, _READS or _BEGINS; reads: the place of the
    sequence's memories; total: [1].
    """

    start: jax.Array
    rows: jax.Array
    whole: jax.Array
    source: jax.Array
    reads: jax.Array
    total: jax.Array


def items_of(sequences: Sequences, rows: int) -> Items:
    """Items of up to `rows` tokens; if that is CHUNK, cut at its multiples of positions."""
    starts, tokens = sequences.starts, sequences.positions.shape[0]
    number, lengths = starts.shape[0] - 1, jnp.diff(starts)
    positions = sequences.positions[jnp.minimum(starts[:-1], tokens - 1)]
    grid = starts[:-1] - (positions % CHUNK if rows == CHUNK else 0)  # where the first item of a sequence would begin
    counts = jnp.where(lengths > 0, -(-(starts[1:] - grid) // rows), 0)
    ends = jnp.cumsum(counts)
    item = jnp.arange(min(tokens, tokens // rows + 2 * number), dtype=jnp.int32)
    used = jnp.minimum(item, jnp.maximum(ends[-1] - 1, 0))
    owner = jnp.minimum(jnp.searchsorted(ends, used, side="right"), number - 1).astype(jnp.int32)
    turn = used - (ends - counts)[owner]
    begin = grid[owner] + turn * rows
    start, end = jnp.maximum(begin, starts[owner]), jnp.minimum(begin + rows, starts[owner + 1])
    if rows == CHUNK:
        whole = whole_chunks(sequences, row_of(starts, tokens), CHUNK)[start]
    else:
        whole = jnp.zeros_like(start)
    source = jnp.where(turn > 0, _CONTINUES, jnp.where(sequences.begins[owner], _BEGINS, _READS))
    return Items(start, jnp.maximum(end - start, 0), whole, source, sequences.reads[owner], ends[-1:])


def delta_net(operands: Operands, tiled: bool, interpret: Any = False) -> tuple[jax.Array, DeltaState]:
    """As the package's contract says."""
    given, tail = mixed(operands, tiled)
    sequences, memory = operands.sequences, operands.state.memory
    places, heads, key_dim, value_dim = memory.shape[1:]
    tokens, first = given.q.shape[0], jnp.asarray(operands.layer, jnp.int32) * places
    rows = CHUNK if tokens >= CHUNK else 1 if tokens <= sequences.reads.shape[0] else _FEW
    items = items_of(sequences, rows)
    flat = memory.reshape(-1, *memory.shape[2:])
    writes = jnp.where(sequences.writes < 0, -1, first + sequences.writes)
    scalars = (*items._replace(reads=first + items.reads), writes)

    def kernel(*refs: Any) -> None:
        *tables, writes, q, k, v, gates, before, out, memories, kept, results, pending, kept_sent, rows_sent = refs
        start, count, whole, source, _, total = tables
        block, item = pl.program_id(0), pl.program_id(1)
        here, other = item % 2, 1 - item % 2
        columns = pl.ds(block * HEADS, HEADS)

        def sending(slot: Any, place: Any) -> Any:
            return pltpu.make_async_copy(kept.at[slot], memories.at[place, columns], kept_sent.at[slot])

        def leaving(slot: Any, row: Any, token: Any) -> Any:
            return pltpu.make_async_copy(results.at[slot, row], out.at[token, columns], rows_sent.at[slot])

        def settle(slot: Any) -> None:
            """Waits until what the slot's last item sent has arrived."""
            pl.when(pending[slot, 0] > 0)(lambda: sending(slot, 0).wait())
            lax.fori_loop(0, pending[slot, 1], lambda i, _: leaving(slot, 0, 0).wait(), None)
            pending[slot, 0] = pending[slot, 1] = 0

        def begin() -> None:
            for slot in (0, 1):
                pending[slot, 0] = pending[slot, 1] = 0

        def end() -> None:
            settle(other)
            settle(here)

        def hold(values: Any) -> None:
            kept[here] = values

        pl.when(item == 0)(begin)
        settle(here)
        pl.when(source[item] == _CONTINUES)(lambda: hold(kept[other]))
        pl.when(source[item] == _READS)(lambda: hold(before[0]))
        pl.when(source[item] == _BEGINS)(lambda: hold(jnp.zeros(kept.shape[1:], jnp.float32)))

        def walk(row: Any, carry: None) -> None:
            query, key = q[row].T, k[row].T  # [dk, heads]
            for head in range(HEADS):
                mine = slice(head, head + 1)
                gate = gates[row, mine]
                value = kept[here, head] * jnp.exp(gate[:, :1])
                found = jnp.sum(value * key[:, mine], axis=0, keepdims=True)
                value = value + key[:, mine] * (gate[:, 1:] * (v[row, mine] - found))
                kept[here, head] = value
                results[here, row, mine] = jnp.sum(value * query[:, mine], axis=0, keepdims=True)
            place = writes[start[item] + row]

            pl.when(place >= 0)(lambda: sending(here, place).start())
            pl.when((place >= 0) & (row + 1 < count[item]))(lambda: sending(here, place).wait())  # before the next token

        def chunk() -> None:
            for head in range(HEADS):
                at = slice(None), head
                gate = gates[at]
                log_decay, beta = gate[:, :1], gate[:, 1:]
                queries, keys = [functools.partial(q.__getitem__, at)], [functools.partial(k.__getitem__, at)]
                inverse, seen = within_chunk(queries, keys, log_decay, beta, _dot)
                (kept[here, head],) = through_chunk(
                    queries, keys, v[at], log_decay, beta, inverse, seen, [kept[here, head]], _dot,
                    functools.partial(results.__setitem__, (here, *at)),
                )  # fmt: skip
            place = writes[start[item] + CHUNK - 1]
            pl.when(place >= 0)(lambda: sending(here, place).start())

        if rows == CHUNK:
            pl.when(whole[item] == 1)(chunk)
        pl.when(whole[item] == 0)(lambda: lax.fori_loop(0, count[item], walk, None))
        lax.fori_loop(0, count[item], lambda row, _: leaving(here, row, start[item] + row).start(), None)
        last = writes[start[item] + jnp.maximum(count[item] - 1, 0)]
        pending[here, 0] = jnp.where((last >= 0) & (count[item] > 0), 1, 0)
        pending[here, 1] = count[item]

        pl.when(item == total[0] - 1)(end)

    def tokens_of(last: int) -> pl.BlockSpec:
        shape = tuple(map(pl.Element, (rows, HEADS, last)))
        return pl.BlockSpec(shape, lambda block, item, start, *_: (start[item], block * HEADS, 0))

    def memories_of(block: Any, item: Any, *tables: Any) -> tuple[Any, ...]:
        return tables[4][item], block, 0, 0

    def padded(x: jax.Array) -> jax.Array:  # the rows of the last item
        return jnp.pad(x, ((0, rows - 1), (0, 0), (0, 0)))

    gates = jnp.stack([given.log_decay, given.beta], axis=-1)
    inputs = [*map(padded, (given.q, given.k, given.v, gates)), flat]
    slots = pltpu.SemaphoreType.DMA((2,))
    out, flat = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(given.v.shape, jnp.float32), jax.ShapeDtypeStruct(flat.shape, jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(heads // HEADS, jnp.maximum(items.total[0], 1)),
            in_specs=[
                *map(tokens_of, (key_dim, key_dim, value_dim, 2)),
                pl.BlockSpec((1, HEADS, key_dim, value_dim), memories_of),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                pltpu.VMEM((2, HEADS, key_dim, value_dim), jnp.float32),
                pltpu.VMEM((2, rows, HEADS, value_dim), jnp.float32),
                pltpu.SMEM((2, 2), jnp.int32),
                slots,
                slots,
            ],
        ),
        input_output_aliases={len(scalars) + len(inputs) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=48 << 20, disable_bounds_checks=True
        ),
        cost_estimate=_cost(tokens, items.start.shape[0], *memory.shape[2:]),
        name=f"delta_net_{rows}_rows",
        interpret=interpret,
    )(*scalars, *inputs)
    live = jnp.arange(tokens) < sequences.starts[-1]
    return jnp.where(live[:, None, None], out, 0.0), DeltaState(tail, flat.reshape(memory.shape))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _cost(tokens: int, items: int, heads: int, key_dim: int, value_dim: int) -> pl.CostEstimate:
    """For XLA's schedule, as if every item were a sequence."""
    size = heads * key_dim * value_dim
    return pl.CostEstimate(
        flops=7 * tokens * size,
        transcendentals=tokens * heads,
        bytes_accessed=4 * (2 * items * size + tokens * heads * 2 * (key_dim + value_dim)),
    )
