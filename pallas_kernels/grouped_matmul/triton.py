"""Grouped matmul and expert feed-forward on NVIDIA GPUs: the dense body, with the expert of each tile of rows loaded.

Rows are sorted by expert into tiles (grouping.py); a program takes one tile of rows and some rows of its expert's matrices. The
grid has the size of the worst case, and programs after the last tile do nothing, so an expert that no token chose is never
read. The feed-forward is two launches: gate, up and SwiGLU of rows picked by their token, then down, whose results go back to
the places of their tokens; XLA adds these in the order of ranks. A product takes its biases before it is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.blocks import gpu
from pallas_kernels.blocks.layouts import open_axes
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_matmul import grouping, triton_grouping
from pallas_kernels.grouped_matmul.grouping import Tiles
from pallas_kernels.grouped_matmul.parts import Biases, Clamp, gated
from pallas_kernels.quantized_matmul import triton as dense
from pallas_kernels.quantized_matmul.gpu_tiles import products

refuses = dense.refuses


def grouped(x: jax.Array, group_sizes: jax.Array, experts: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """Row r of x [m, k], sorted by expert, times its expert's matrix, transposed: float32 [m, n]; 0 beyond the groups."""
    m = x.shape[0]
    shape = _tile(m, group_sizes.shape[0], (experts,), target)
    work = grouping.tiles(group_sizes, m, shape.batch)
    place = jnp.arange(m, dtype=jnp.int32)
    y = _launch("grouped_matmul", gpu.ordered(x), (experts,), jnp.float32, shape, interpret, place, work)
    return jnp.where(place[:, None] < jnp.sum(group_sizes), y, 0.0)


def expert_ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    target: Target,
    biases: Biases | None = None,
    clamp: Clamp | None = None,
    interpret: bool = False,
) -> jax.Array:
    """float32 [tokens, k]: the weighted sum of every token's experts, in the order of their ranks. See the package's
    contract."""
    tokens, top_k = expert_ids.shape
    (count,), chosen = open_axes(gate), tokens * top_k
    shape = _tile(chosen, count, (gate, up), target)
    flat, order, work = expert_ids.reshape(-1), None, None
    if tokens > 1 and chosen <= triton_grouping.MOST:
        order, work = triton_grouping.group(flat, count, shape.batch, interpret)
    elif tokens > 1:
        order, _, _, expert, start, length, total = grouping.group(flat, count, shape.batch)
        work = Tiles(expert, start, length, total)
    launch = functools.partial(_launch, experts=flat, work=work, order=order, interpret=interpret)
    hidden = launch(
        "expert_gate_up",
        gpu.ordered(x),
        matrices=(gate, up),
        dtype=x.dtype,
        shape=shape,
        pick=top_k,
        biases=biases[:2] if biases else (),
        clamp=clamp,
    )
    shape, of_down = _tile(chosen, count, (down,), target, shape.batch), biases[2:] if biases else ()
    y = launch("expert_down", hidden, matrices=(down,), dtype=jnp.float32, shape=shape, biases=of_down)
    y = y.reshape(tokens, top_k, -1)
    terms = (jnp.where(expert_ids[:, i, None] < count, y[:, i] * expert_weights[:, i, None], 0.0) for i in range(top_k))
    return functools.reduce(jnp.add, terms)


def _tile(rows: int, experts: int, matrices: Sequence[Matrix], target: Target, batch: int | None = None) -> dense.Tile:
    """Tiles of about twice the rows that an expert gets on average, so that most experts are read once."""
    batch = batch or max(8, min(64, 1 << (2 * rows // experts - 1).bit_length()))
    return dense.tile(batch, matrices, min(rows, experts) * matrices[0].rows, target)


def _launch(
    name: str,
    x: jax.Array,
    matrices: Sequence[Matrix],
    dtype: Any,
    shape: dense.Tile,
    interpret: bool,
    experts: jax.Array,
    work: Tiles | None,
    order: jax.Array | None = None,
    pick: int = 0,
    biases: Sequence[jax.Array] = (),
    clamp: Clamp | None = None,
) -> jax.Array:
    """Rows times the matrix of their expert, or `gated` of two products: [rows, n] of `dtype`. biases: of the products.

    experts: int32 [rows], without `work` each row is a separate tile; with it only the length counts. Without `order`, places
    are rows. With it, place i belongs to row order[i] of the assignments: with `pick`, row order[i] // pick of x is multiplied
    and the result stays at place i, in the order of the planes, to be multiplied again; without `pick`, row i of x is
    multiplied and the result goes to row order[i].
    """
    n, rows = matrices[0].rows, experts.shape[0]
    tables = [experts] if work is None else [*work[:3], work.num_tiles.reshape(1)]
    tables += [] if order is None else [order]
    given = len(tables) + len(biases)
    (count,) = open_axes(matrices[0])

    def kernel(x_ref: Any, count_ref: Any, *refs: Any) -> None:
        table, added, inputs, output = refs[: len(tables)], refs[len(tables) : given], refs[given:-1], refs[-1]
        row = pl.program_id(0) * shape.rows + lax.iota(jnp.int32, shape.rows)
        index = pl.program_id(1)
        used = table[0][index] < count if work is None else index < table[3][0]

        @pl.when(used)
        def _() -> None:
            lane = lax.iota(jnp.int32, shape.batch)
            start, length = (index, 1) if work is None else (table[1][index], table[2][index])
            valid, place = lane < length, start + lane
            assignment = place
            if order is not None:
                assignment = compat.triton_load(table[-1].at[place], mask=valid, other=rows)
            source, target = (assignment // pick, place) if pick else (place, assignment)
            expert = table[0][index]
            operands = dense.unflatten(matrices, inputs, dense.counting(count_ref), (expert,))

            def load_x(first: Any, width: int) -> Any:
                at = (source[:, None], (first + lax.iota(jnp.int32, width))[None])
                return compat.triton_load(x_ref.at[at], mask=valid[:, None], other=0)

            totals = products(operands, jnp.minimum(row, n - 1), load_x, shape.batch, x.dtype, interpret)
            for i, bias in enumerate(added):
                totals[i] += compat.triton_load(bias.at[expert, row], mask=row < n, other=0.0)[:, None]
            column = gpu.place_of(row, n) if pick else row
            mask = valid[:, None] & (row < n)[None]
            compat.triton_store(output.at[target[:, None], column[None]], gated(totals, clamp).astype(dtype).T, mask=mask)

    return compat.triton_call(
        kernel,
        name=name,
        grid=(-(-n // shape.rows), tables[0].shape[0]),
        out_shape=jax.ShapeDtypeStruct((rows, n), dtype),
        num_warps=shape.warps,
        num_stages=shape.stages,
        interpret=interpret,
    )(x, dense.COUNT, *tables, *biases, *dense.flatten(matrices))
