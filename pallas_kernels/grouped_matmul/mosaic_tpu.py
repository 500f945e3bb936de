"""Mixture-of-experts feed-forward and grouped matmul on TPU, over compressed experts (memory layout "tpu").

Few rows per expert (decode): one kernel from the tokens to the weighted sum. A step takes one expert's gate, up and down and up
to eight of its rows; scalar prefetch selects the expert, and the grid ends where the routing does, so an expert that no token
chose is not read. Many rows (prefill): XLA gathers the rows by expert, and a step multiplies the rows that a tile of 128 shares
with one expert. Results are added in the order of ranks, so a token does not depend on its neighbors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.tpu import filled
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_matmul.grouping import Tiles, group, max_tiles, tiles
from pallas_kernels.grouped_matmul.parts import Biases, Clamp, gated
from pallas_kernels.grouped_matmul.tpu_grouping import MOST, group_few
from pallas_kernels.quantized_matmul import tpu_tiles
from pallas_kernels.quantized_matmul.mosaic_tpu import (
    VMEM,
    block_columns,
    filled_rows,
    indices_of,
    plane_specs,
    refuses,
    tiles_of,
)

__all__ = ["expert_ffn", "grouped", "refuses"]

FEW = 8  # rows per step of the kernels for few rows, and the average rows per expert up to which they are used
MANY = 128
_SMALL = 2  # rows up to which the fused kernel has a separate body: at batch 1 an expert has one row


def grouped(x: jax.Array, group_sizes: jax.Array, matrix: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """Rows x [m, k] bfloat16, sorted by expert, each times its expert's matrix, transposed: float32 [m, n].

    group_sizes: int32 [E]. Rows beyond their sum are zero.
    """
    rows = FEW if x.shape[0] <= FEW * group_sizes.shape[0] else MANY
    y = _grouped(x, tiles(group_sizes, x.shape[0], rows, aligned=True), (matrix,), rows, interpret)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), y, 0.0)


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
    """The sum over ranks of weight * down(gated(gate x, up x)) of each token's experts: float32 [T, K].

    x bfloat16 [T, K]; expert_ids int32 and expert_weights float32 [T, top_k], the id is the number of experts where there is no
    expert.
    """
    tokens, top_k = expert_ids.shape
    num_experts = gate.planes[0].shape[len(gate.index)]
    few = tokens * top_k <= FEW * num_experts
    whole = gate.rows % 128 == gate.columns % 128 == 0  # widths of blocks
    if few and whole and tokens * top_k <= MOST and _fused_bytes(tokens, top_k, gate, up, down) <= VMEM:
        return _fused(x, expert_ids, expert_weights, gate, up, down, biases, clamp, interpret)
    rows = FEW if few else MANY
    groups = group(expert_ids.reshape(-1), num_experts, rows, aligned=True)
    work = Tiles(*groups[3:])
    of_hidden, of_down = (biases[:2], biases[2:]) if biases else ((), ())
    hidden = _grouped(x[groups.order // top_k], work, (gate, up), rows, interpret, of_hidden, clamp)
    y = _grouped(hidden, work, (down,), rows, interpret, of_down)
    place = groups.place.reshape(tokens, top_k)
    terms = (
        jnp.where(expert_ids[:, s, None] < num_experts, y[place[:, s]] * expert_weights[:, s, None], 0.0) for s in range(top_k)
    )
    return functools.reduce(jnp.add, terms)


def _expert_specs(matrices: Sequence[Matrix], columns: Sequence[int], tables: int) -> list[pl.BlockSpec]:
    """Blocks of the planes of step j's expert; scalars are `tables`, the first with the experts, then stack indices."""
    specs: list[pl.BlockSpec] = []
    for matrix, width in zip(matrices, columns, strict=True):
        specs += plane_specs(matrix, width, lambda i, j, expert, *_: (expert[(0,) * (expert.ndim - 1) + (j,)], i), tables)
        tables += len(matrix.index)
    return specs


def _bias_specs(columns: Sequence[int]) -> list[pl.BlockSpec]:
    """Blocks of `_blocked` biases of step j's expert; as `_expert_specs`."""

    def place(i: Any, j: Any, expert: Any, *scalars: Any) -> tuple[Any, ...]:
        return expert[(0,) * (expert.ndim - 1) + (j,)], 0, i

    return [pl.BlockSpec((1, 1, width), place) for width in columns]


def _blocked(bias: jax.Array) -> jax.Array:
    """[E, n] as [E, 1, n], of which a block may be one row."""
    return bias[:, None]


def _cut(refs: Sequence[Any], *counts: int) -> Iterator[Sequence[Any]]:
    """Runs of `counts` of them, then the rest."""
    for count in counts:
        yield refs[:count]
        refs = refs[count:]
    yield refs


def _finished(results: Sequence[jax.Array], biases: Sequence[Any], clamp: Clamp | None) -> jax.Array:
    """One product, or SwiGLU of two, after their biases (blocks [1, 1, n]), if there are any."""
    if biases:
        results = [result + bias[0] for result, bias in zip(results, biases, strict=True)]
    return gated(results, clamp)


def _factors(matrix: Matrix, columns: int) -> Any:
    return pltpu.VMEM((tpu_tiles.factor_rows(matrix.format, filled(matrix.columns)), columns), jnp.float32)


def _plane_bytes(*matrices: Matrix) -> int:
    """Of one expert."""
    return sum(math.prod(p.shape[-2:]) * p.dtype.itemsize for matrix in matrices for p in matrix.planes)


@functools.partial(jax.jit, static_argnames=("rows", "interpret", "clamp"), inline=True)
def _grouped(
    x: jax.Array,
    work: Tiles,
    matrices: tuple[Matrix, ...],
    rows: int,
    interpret: bool,
    biases: tuple[jax.Array, ...] = (),
    clamp: Clamp | None = None,
) -> jax.Array:
    """x [m, k] times each row's expert: float32 [m, n]; of gate and up, SwiGLU in the dtype of x. biases: of the products.

    work: aligned tiles of `rows` rows. Rows outside of all tiles are not written.
    """
    x = filled_rows(x)
    (m, k), n = x.shape, matrices[0].rows
    few = rows == FEW
    columns = block_columns([matrices], 512 if few else 1024)
    indices, planes = indices_of(matrices), [plane for matrix in matrices for plane in matrix.planes]
    dtype = jnp.float32 if len(matrices) == 1 else x.dtype

    def kernel(expert: Any, start: Any, count: Any, *refs: Any) -> None:
        x, *rest = refs[len(indices) :]
        plane_refs, added, (out, *scratch_refs) = _cut(rest, len(planes), len(biases))
        mine = tiles_of(matrices, plane_refs)
        factors, weights = scratch_refs[: len(mine)], scratch_refs[len(mine) :]
        j = pl.program_id(1)
        if few:
            results = tpu_tiles.folded(mine, factors, rows, x)
        else:

            @pl.when((j == 0) | (expert[j] != expert[jnp.maximum(j - 1, 0)]))
            def _() -> None:
                for tile, factor, expanded in zip(mine, factors, weights, strict=True):
                    tpu_tiles.expand(tile, factor, expanded)

            results = [jnp.dot(x[...], w[...], preferred_element_type=jnp.float32) for w in weights]
        row = lax.broadcasted_iota(jnp.int32, (rows, columns), 0) - start[j] % rows
        result = _finished(results, added, clamp).astype(dtype)
        out[...] = jnp.where((row >= 0) & (row < count[j]), result, out[...])

    scratch = [_factors(matrix, columns) for matrix in matrices]
    if not few:
        scratch += [pltpu.VMEM((k, columns), jnp.bfloat16)] * len(matrices)
    touched = min(m, work.tile_expert.shape[0])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(indices),
            grid=(math.ceil(n / columns), work.num_tiles),
            in_specs=[
                pl.BlockSpec((rows, k), lambda i, j, expert, start, *scalars: (start[j] // rows, 0)),
                *_expert_specs(matrices, [columns] * len(matrices), 3),
                *_bias_specs([columns] * len(biases)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda i, j, expert, start, *scalars: (start[j] // rows, i)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        cost_estimate=_cost(m, touched, matrices),
        name="_".join(["grouped", "few" if few else "many", "rows", *(matrix.format for matrix in matrices)]),
        interpret=interpret,
    )(work.tile_expert, work.tile_start, work.tile_rows, *indices, x, *planes, *map(_blocked, biases))


def _cost(rows: int, touched: int, matrices: Sequence[Matrix]) -> pl.CostEstimate:
    """For XLA's schedule, as if every tile had a different expert."""
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    moved = touched * _plane_bytes(*matrices) + rows * sum(2 * matrix.columns + 4 * matrix.rows for matrix in matrices)
    return pl.CostEstimate(flops=2 * rows * weights, transcendentals=0, bytes_accessed=moved)


def _fused_bytes(tokens: int, top_k: int, gate: Matrix, up: Matrix, down: Matrix) -> int:
    """VMEM of the fused kernel: the pipeline's copies are double-buffered."""
    rows, k, n = -(-tokens // 16) * 16, gate.columns, gate.rows
    scratch = (rows + FEW + top_k * rows + 8) * k + FEW * n
    scratch += sum(tpu_tiles.factor_rows(m.format, m.columns) * m.rows for m in (gate, up, down))
    return 2 * (_plane_bytes(gate, up, down) + rows * (6 * k + 1024)) + 4 * scratch + (2 << 20)


@functools.partial(jax.jit, static_argnames=("interpret", "clamp"), inline=True)
def _fused(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    biases: Biases | None,
    clamp: Clamp | None,
    interpret: bool,
) -> jax.Array:
    """The whole feed-forward in one kernel; see the module."""
    (tokens, k), n, top_k = x.shape, gate.rows, expert_ids.shape[1]
    matrices = (gate, up, down)
    num_experts = gate.planes[0].shape[len(gate.index)]
    padded = -(-tokens // 16) * 16
    work = group_few(expert_ids.reshape(-1), num_experts, FEW, interpret)
    indices, planes = indices_of(matrices), [plane for matrix in matrices for plane in matrix.planes]
    inputs = (x, expert_ids, expert_weights)

    def kernel(expert: Any, start: Any, count: Any, order: Any, *refs: Any) -> None:
        x, routed, expert_weights, *rest = refs[len(indices) :]
        plane_refs, added, (out, wide_x, mine, hidden, results, *factors) = _cut(rest, len(planes), len(biases or ()))
        gate_tile, up_tile, down_tile = tiles_of(matrices, plane_refs)
        i = pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            wide_x[...] = x[...].astype(jnp.float32)  # single rows at arbitrary places can be read only from 32-bit arrays

        place = [order[0, jnp.minimum(start[0, i] + row, tokens * top_k - 1)] for row in range(FEW)]
        for row in range(FEW):
            mine[row : row + 1] = wide_x[pl.ds(lax.div(place[row], top_k), 1)]

        def body(m: int) -> None:
            products = tpu_tiles.folded((gate_tile, up_tile), factors[:2], m, mine)
            hidden[:m] = _finished(products, added[:2], clamp).astype(jnp.bfloat16).astype(jnp.float32)
            y = _finished(tpu_tiles.folded((down_tile,), factors[2:], m, hidden), added[2:], None)
            for row in range(m):
                rank, token = lax.rem(place[row], top_k), lax.div(place[row], top_k)
                to = jnp.where(row < count[0, i], rank * padded + token, top_k * padded)
                results[pl.ds(to, 1)] = y[row : row + 1]

        pl.when(count[0, i] <= _SMALL)(lambda: body(_SMALL))
        pl.when(count[0, i] > _SMALL)(lambda: body(FEW))

        @pl.when(i == pl.num_programs(1) - 1)
        def _() -> None:
            total = jnp.zeros((padded, k), jnp.float32)
            for rank in range(top_k):
                part = results[rank * padded : (rank + 1) * padded] * expert_weights[:, rank : rank + 1]
                total = total + jnp.where(routed[:, rank : rank + 1] < num_experts, part, 0.0)
            out[...] = total

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, k), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 + len(indices),
            grid=(1, work.num_tiles),
            in_specs=[pl.BlockSpec((padded, array.shape[1]), lambda *at: (0, 0)) for array in inputs]
            + _expert_specs(matrices, [matrix.rows for matrix in matrices], 4)
            + _bias_specs([matrix.rows for matrix in matrices][: len(biases or ())]),
            out_specs=pl.BlockSpec((padded, k), lambda *at: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((padded, k), jnp.float32),
                pltpu.VMEM((FEW, k), jnp.float32),
                pltpu.VMEM((FEW, n), jnp.float32),
                pltpu.VMEM((top_k * padded + 8, k), jnp.float32),
                *(_factors(matrix, matrix.rows) for matrix in matrices),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        cost_estimate=_cost(tokens * top_k, max_tiles(tokens * top_k, num_experts, FEW), matrices),
        name="_".join(["expert_ffn", *(matrix.format for matrix in matrices)]),
        interpret=interpret,
    )(work.tile_expert, work.tile_start, work.tile_rows, work.order, *indices, *inputs, *planes, *map(_blocked, biases or ()))
