"""Compressed matmul on TPU: one launch over the tiles of one or several matrices that share x.

Few rows (decode) use the folded product, which is limited by memory; for many (prefill) each tile of weights is expanded once
in VMEM and multiplied by every tile of rows. The copies of the pipeline select the matrix of a stack by its index: no layer is
sliced. Layout "tpu" (blocks/tpu.py); see docs/kernels-tpu.md for the design.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.tpu import filled, plane_names
from pallas_kernels.dispatch import Case, Target
from pallas_kernels.quantized_matmul import tpu_tiles as tiles

FEW_ROWS = 16
VMEM = 48 << 20  # bytes that a kernel may use on every generation from v5e on
_PLANES = 6 << 20  # of these, for the planes of one step, which are double-buffered
_ROWS = 12 << 20  # for the rows of one step, likewise


def refuses(case: Case) -> str | None:
    """None, or why the kernels cannot serve a case."""
    if case.memory_layout != "tpu":
        return f'reads memory layout "tpu", not "{case.memory_layout}"'
    if case.dtype != "bfloat16":
        return f"computes in bfloat16, not {case.dtype}"
    return None


def matmul(x: jax.Array, matrix: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """x [m, k] bfloat16 times the transposed matrix [n, k]: float32 [m, n]."""
    return matmuls(x, (matrix,), target, interpret)[0]


def matmuls(x: jax.Array, matrices: Sequence[Matrix], target: Target, interpret: bool = False) -> list[jax.Array]:
    """x [m, k] times each transposed matrix [n_i, k]: float32 [m, n_i]."""
    return _launch(x, tuple((matrix,) for matrix in matrices), interpret)


def swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """silu(x · gateᵀ) * (x · upᵀ): [m, n] bfloat16."""
    return _launch(x, ((gate, up),), interpret)[0]


def finish(results: Sequence[jax.Array]) -> jax.Array:
    """The product for a job with one matrix, SwiGLU for one with two."""
    if len(results) == 1:
        return results[0]
    gate, up = results
    return gate / (1.0 + jnp.exp(-gate)) * up


def block_columns(jobs: Sequence[Sequence[Matrix]], most: int = 512) -> int:
    """Outputs per tile: `most`, or fewer so that a job's planes fit into their share and tiles are equally full."""
    width = max(sum(p.shape[-2] * p.dtype.itemsize for m in job for p in m.planes) for job in jobs)
    limit = max(128, min(most, _PLANES // width // 128 * 128))
    n = max(job[0].rows for job in jobs)
    return _round_up(math.ceil(n / math.ceil(n / limit)), 128)


def filled_rows(x: jax.Array) -> jax.Array:
    """x [m, k] with zeros for the weights that fill up rows of planes."""
    return jnp.pad(x, ((0, 0), (0, filled(x.shape[1]) - x.shape[1])))


def indices_of(matrices: Sequence[Matrix]) -> list[jax.Array]:
    """Scalars to prefetch, int32 [1] each: the stack indices of all matrices."""
    return [jnp.asarray(i, jnp.int32).reshape(1) for matrix in matrices for i in matrix.index]


def plane_specs(matrix: Matrix, columns: int, where: Callable, first: int) -> list[pl.BlockSpec]:
    """Blocks of the planes, on a grid of two axes: all of k, `columns` outputs.

    The matrix is chosen by the prefetched scalars from number `first` on, its stack indices. where(i, j, *scalars) gives the
    rest of a block's place: (column block,), or (expert, column block).
    """
    depth = len(matrix.index)

    def block(i: Any, j: Any, *scalars: Any) -> Any:
        *experts, column = where(i, j, *scalars)
        return (*(scalar[0] for scalar in scalars[first : first + depth]), *experts, 0, column)

    return [pl.BlockSpec((*(None,) * (plane.ndim - 2), plane.shape[-2], columns), block) for plane in matrix.planes]


def tiles_of(matrices: Sequence[Matrix], refs: Sequence) -> list[tiles.Tile]:
    """The refs of all planes, matrix by matrix."""
    found = iter(refs)
    return [tiles.Tile(m.format, filled(m.columns), {name: next(found) for name in plane_names(m.format)}) for m in matrices]


@functools.partial(jax.jit, static_argnames="interpret", inline=True)
def _launch(x: jax.Array, jobs: tuple[tuple[Matrix, ...], ...], interpret: bool) -> list[jax.Array]:
    """One result per job, which is one matrix, or gate and up."""
    x = filled_rows(x)
    m, k = x.shape
    matrices = [matrix for job in jobs for matrix in job]
    few = m <= FEW_ROWS
    rows = _round_up(m, 8) if few else min(512, _round_up(m, 16), _ROWS // (4 * k) // 16 * 16)
    columns = block_columns(jobs)
    spans, steps = [], 0
    for job in jobs:
        spans.append((steps, steps + math.ceil(job[0].rows / columns)))
        steps = spans[-1][1]
    width = jobs[0][0].rows if len(jobs) == 1 else steps * columns
    indices, planes = indices_of(matrices), [plane for matrix in matrices for plane in matrix.planes]
    dtype = jnp.float32 if len(jobs[0]) == 1 else x.dtype
    specs, first = [pl.BlockSpec((rows, k), lambda i, j, *scalars: (j, 0))], 0
    for job, (begin, end) in zip(jobs, spans, strict=True):
        for matrix in job:

            def where(i: Any, j: Any, *scalars: Any, begin: Any = begin, end: Any = end) -> Any:
                return (jnp.clip(i, begin, end - 1) - begin,)

            specs += plane_specs(matrix, columns, where, first)
            first += len(matrix.index)

    most = max(len(job) for job in jobs)
    scratch = [pltpu.VMEM((max(tiles.factor_rows(matrix.format, k) for matrix in matrices), columns), jnp.float32)] * most
    if not few:
        scratch += [pltpu.VMEM((k, columns), jnp.bfloat16)] * most

    def kernel(*refs: Any) -> None:
        x, *rest = refs[len(indices) :]
        plane_refs, out, *scratch_refs = rest[: len(planes)], *rest[len(planes) :]
        factors, weights = scratch_refs[:most], scratch_refs[most:]
        every = iter(tiles_of(matrices, plane_refs))
        step, fresh = pl.program_id(0), pl.program_id(1) == 0
        for job, (begin, end) in zip(jobs, spans, strict=True):
            mine = [next(every) for _ in job]

            @pl.when((step >= begin) & (step < end))
            def _(mine: Any = mine) -> None:
                if few:
                    out[:m] = finish(tiles.folded(mine, factors[: len(mine)], m, x)).astype(dtype)
                else:
                    out[...] = finish(_many(x, mine, factors, weights, fresh)).astype(dtype)

    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(indices),
            grid=(steps, math.ceil(m / rows)),
            in_specs=specs,
            out_specs=pl.BlockSpec((rows, columns), lambda i, j, *scalars: (j, i)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        cost_estimate=_cost(m, k, matrices),
        name="_".join(["few" if few else "many", "rows", *(matrix.format for matrix in matrices)]),
        interpret=interpret,
    )(*indices, x, *planes)
    if len(jobs) == 1:
        return [y]
    return [y[:, begin * columns : begin * columns + job[0].rows] for job, (begin, _) in zip(jobs, spans, strict=True)]


def _many(x: jax.Array, mine: Sequence[tiles.Tile], factors: Any, weights: Any, fresh: Any) -> list[jax.Array]:
    @pl.when(fresh)
    def _() -> None:
        for tile, scratch, out in zip(mine, factors, weights, strict=False):
            tiles.expand(tile, scratch, out)

    return [jnp.dot(x[...], out[...], preferred_element_type=jnp.float32) for out in weights[: len(mine)]]


def _cost(m: int, k: int, matrices: Sequence[Matrix]) -> pl.CostEstimate:
    """For XLA's schedule: the product, and the bytes of the planes, of x and of the result."""
    outputs = sum(matrix.rows for matrix in matrices)
    planes = sum(math.prod(p.shape[-2:]) * p.dtype.itemsize for matrix in matrices for p in matrix.planes)
    return pl.CostEstimate(flops=2 * m * k * outputs, transcendentals=0, bytes_accessed=planes + 2 * m * k + 4 * m * outputs)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
