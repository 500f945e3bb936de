"""Times and checks the compressed products with other tiles than the kernels' own choice, like the section "kernels".

The kernels choose rows of the matrix, warps and stages by the number of rows of x, from instruction counts of compiled code.
Only a device can show whether latency, occupancy or memory decides instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

from benchmarks.gpu import kernels, weights
from benchmarks.gpu.lab import Lab
from pallas_kernels.quantized_matmul import triton

COMPILED_ELSEWHERE = (weights.draw, weights.normal, *kernels.EXACT, *kernels.EXACT.values())


class Tile(NamedTuple):
    """Rows of the matrix per program, its warps, and the steps of k in flight."""

    rows: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.warps} warps, {self.stages} stages"


FEW = tuple(Tile(*one) for one in ((16, 1, 3), (16, 1, 5), (16, 2, 4), (32, 1, 4), (32, 2, 3), (32, 2, 4), (64, 4, 3)))
MANY = tuple(Tile(*one) for one in ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)))


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    alone = kernels.Alone(lab)
    many = lab.sizes.batch
    cases: list[tuple[str, tuple[Tile, ...], Callable[[], Iterator[dict]]]] = [
        ("experts 1", FEW, lambda: alone.experts(1, "bfloat16")),
        (f"experts {many}", FEW, lambda: alone.experts(many, "bfloat16")),
        ("qkv 1", FEW, lambda: alone.dense("qkv", 1)),
        (f"experts {64 * many}", MANY, lambda: alone.experts(64 * many, "bfloat16")),
        (f"qkv {64 * many}", MANY, lambda: alone.dense("qkv", 64 * many)),
    ]
    yield "ceilings", alone.ceilings
    for name, tiles, case in cases[:1] if lab.rehearsal and not lab.collecting else cases:
        yield name, case
        for tile in tiles[:1] if lab.rehearsal else tiles:
            yield f"{name}: {tile}", lambda case=case, tile=tile: tiled(alone, tile, case)


def tiled(alone: kernels.Alone, tile: Tile, case: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """The result rows of `case`, with programs traced for this tile."""
    alone.traced_with = lambda function: with_tile(function, tile)
    try:
        for row in case():
            yield row | {"name": f"{row['name']}: {tile}"}
    finally:
        alone.traced_with = lambda function: function


def with_tile(function: Callable, tile: Tile) -> Callable:
    """`function`, traced with `tile` in place of the kernels' own choice."""
    own = triton.tile

    def choose(*args, **keywords):
        return own(*args, **keywords)._replace(rows=tile.rows, warps=tile.warps, stages=tile.stages)

    def traced(*args, **static):
        with mock.patch.object(triton, "tile", choose):
            return function(*args, **static)

    traced.__name__ = f"{function.__name__}_{tile.rows}_{tile.warps}_{tile.stages}"
    return traced
