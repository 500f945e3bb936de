"""Compressed matmul on NVIDIA GPUs from compute capability 8.0 on: one body for every format and number of rows.

A program multiplies a tile of rows of one matrix by a tile of rows of x, over all of k; x is in the order of the planes, in
which the XLA fusion that computes x writes it. Several matrices share a launch: each has its own run of programs. Layout "gpu"
(blocks/gpu.py), arithmetic in gpu_tiles.py; see docs/kernels-gpu.md for the design.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.blocks import gpu
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Case, Target
from pallas_kernels.quantized_matmul.gpu_tiles import DTYPES, Operand, products

DECODING = 64  # rows of x
COUNT = np.array([0, 1, 2, 3, 0], np.int32)  # without the last 0 XLA would launch a kernel that counts


class Tile(NamedTuple):
    """Rows of the matrix and rows of x per program, its warps, and the steps of k in flight."""

    rows: int
    batch: int
    warps: int
    stages: int


def refuses(case: Case) -> str | None:
    """None, or why the kernels cannot serve a case."""
    if case.target.capability < (8, 0):
        return f"needs compute capability 8.0, not {case.target.model or 'an unknown one'}"
    if case.memory_layout != gpu.NAME:
        return f'reads memory layout "{gpu.NAME}", not "{case.memory_layout}"'
    return None if case.dtype in DTYPES else f"computes in {' and '.join(DTYPES)}, not {case.dtype}"


def matmul(x: jax.Array, matrix: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """x [m, k] bfloat16 or float16 times the transposed matrix [n, k]: float32 [m, n]."""
    return matmuls(x, (matrix,), target, interpret)[0]


def matmuls(x: jax.Array, matrices: Sequence[Matrix], target: Target, interpret: bool = False) -> list[jax.Array]:
    """x [m, k] times each transposed matrix [n_i, k]: float32 [m, n_i], in one launch."""
    parts = parts_of(x.shape[0], sum(matrix.rows for matrix in matrices), x.shape[1])
    sums = _launch("matmul", x, [(matrix,) for matrix in matrices], jnp.float32, target, interpret, parts)
    return [functools.reduce(jnp.add, [y[i] for i in range(parts)]) for y in sums]


def swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: Target, interpret: bool = False) -> jax.Array:
    """silu(x · gateᵀ) * (x · upᵀ): [m, n] in the dtype of x."""
    return _launch("swiglu", x, [(gate, up)], x.dtype, target, interpret)[0][0]


def tile(batch: int, matrices: Sequence[Matrix], rows: int, target: Target) -> Tile:
    """The tile for `batch` rows of x, for `rows` rows of matrices in total, with the sums of `matrices` computed together.

    Few rows of x: as many warps per program as leave a few programs for every multiprocessor (fewer, wider ones read x less
    often). Many: the largest tile with which no target spills. tests/aot compiles all of them.
    """
    hopper, alone, wide = target.capability[0] == 9, len(matrices) == 1, batch > 64 or rows >= 32768
    most = (128 if alone else 64) if hopper else (64 if alone else 32)
    batch = min(max(8, 1 << (batch - 1).bit_length()), most)
    if batch <= 16:
        return Tile(64, batch, 4, 3) if rows >= 32768 else Tile(32, batch, 2, 4) if rows >= 8192 else Tile(16, batch, 1, 4)
    if not wide:
        return Tile(64, batch, 4, 3 if alone else 2)
    crowded = any(gpu.PACKINGS[m.format].levels for m in matrices)  # their tables take registers
    return Tile(128, batch, 4 if batch == 64 and alone and not (hopper or crowded) else 8, 2)


def parts_of(batch: int, rows: int, columns: int) -> int:
    """The number of runs of k into which a product is cut; the operation that reads it sums them. Small matrices have too few
    rows to keep every scheduler of a large GPU busy, and the sum is free if it joins the residual (the attention output); for
    q, k and v it would be a launch each. The number is the same for all numbers of rows of x in decoding."""
    if batch > DECODING:
        return 1
    units = columns // (64 * gpu.groups_of(columns))
    return max(n for n in (1, 2, 4) if n == 1 or (rows * n <= 8192 and units % n == 0 and units >= 4 * n))


def silu_product(totals: Sequence[jax.Array]) -> jax.Array:
    """The total of a plain product; SwiGLU of two totals."""
    if len(totals) == 1:
        return totals[0]
    gate, up = totals
    return gate / (1.0 + jnp.exp(-gate)) * up


def counting(ref: Any) -> dict[int, jax.Array]:
    """Operand.counts from a reference to COUNT."""
    return {n: ref[pl.ds(0, n)] for n in (1, 2, 4)}


def flatten(matrices: Sequence[Matrix]) -> list[jax.Array]:
    """The operands of a kernel: planes and indices of all matrices."""
    return [part for m in matrices for part in (*m.planes, *(i.reshape(1) for i in m.index))]


def unflatten(matrices: Sequence[Matrix], refs: Sequence[Any], counts: Any, lead: tuple[jax.Array, ...] = ()) -> list[Operand]:
    """The matrices inside the kernel; `lead` are indices for the stack axes that the matrices leave open."""
    operands, at = [], 0
    for m in matrices:
        planes, index = refs[at : at + len(m.planes)], refs[at + len(m.planes) : at + len(m.planes) + len(m.index)]
        at += len(m.planes) + len(m.index)
        operands.append(Operand(m.format, m.columns, planes, (*(ref[0] for ref in index), *lead), counts))
    return operands


def _launch(
    name: str, x: jax.Array, jobs: Sequence[Sequence[Matrix]], dtype: Any, target: Target, interpret: bool, parts: int = 1
) -> list[jax.Array]:
    """For each job (matrices of one shape) `silu_product` of x times them: [parts, m, n] of `dtype`, one part per run of k."""
    m, (matrices, counts) = x.shape[0], ([m for job in jobs for m in job], [len(job) for job in jobs])
    heights = [job[0].rows for job in jobs]
    shape = tile(m, max(jobs, key=len), sum(heights) * parts, target)
    ends = [sum(-(-n // shape.rows) for n in heights[: i + 1]) for i in range(len(jobs))]

    def kernel(x_ref: Any, count_ref: Any, *refs: Any) -> None:
        small = counting(count_ref)
        inputs, outputs = refs[: -len(jobs)], refs[-len(jobs) :]
        row = pl.program_id(0) * shape.batch + lax.iota(jnp.int32, shape.batch)
        operands = unflatten(matrices, inputs, small)
        place, part = pl.program_id(1), pl.program_id(2) if parts > 1 else 0

        def load_x(first: Any, width: int) -> Any:
            at = (row[:, None], (first + lax.iota(jnp.int32, width))[None])
            return compat.triton_load(x_ref.at[at], mask=row[:, None] < m, other=0)

        for i, output in enumerate(outputs):
            start = ends[i - 1] if i else 0
            mine = operands[sum(counts[:i]) : sum(counts[: i + 1])]

            @pl.when((place >= start) & (place < ends[i]))
            def _(mine: Any = mine, output: Any = output, start: Any = start, n: Any = heights[i]) -> None:
                column = (place - start) * shape.rows + lax.iota(jnp.int32, shape.rows)
                totals = products(mine, jnp.minimum(column, n - 1), load_x, shape.batch, x.dtype, interpret, (part, parts))
                result = silu_product(totals).astype(dtype).T
                compat.triton_store(
                    output.at[part, row[:, None], column[None]], result, mask=(row[:, None] < m) & (column[None] < n)
                )

    return compat.triton_call(
        kernel,
        name=name,
        grid=(-(-m // shape.batch), ends[-1], parts),
        out_shape=[jax.ShapeDtypeStruct((parts, m, n), dtype) for n in heights],
        num_warps=shape.warps,
        num_stages=shape.stages,
        interpret=interpret,
    )(gpu.ordered(x), COUNT, *flatten(matrices))
