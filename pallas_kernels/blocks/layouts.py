"""How compressed matrices are arranged in the memory of a device.

A memory layout is a module: `fits` says whether it can hold a matrix, `pack` makes its planes from the blocks of a file (on the
device, while loading), and `decode` turns them into exact float32. `unit` is how many weights of a row can be packed without
the rest of it; AXES are the axes of a plane along the rows and along the columns of the matrix. A target's kernels read one
layout; plain XLA reads all of them, through `unpack_rows`.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import Target

from . import ggml, gpu, tpu
from .matrix import Matrix
from .ordered import SUFFIX, Ordered

_PLAIN = {module.NAME: module for module in (ggml, gpu, tpu)}
LAYOUTS: dict[str, Any] = _PLAIN | {name + SUFFIX: Ordered(module) for name, module in _PLAIN.items()}


def choose(format: str, rows: int, columns: int, target: Target) -> str:
    """The memory layout in which the kernels of `target` read such a matrix; "ggml" if they do not support it."""
    if target.platform == "gpu" and target.capability >= (8, 0):
        memory_layout = "gpu"
    elif target.platform == "tpu":
        memory_layout = "tpu"
    else:
        return "ggml"
    return memory_layout if LAYOUTS[memory_layout].fits(format, rows, columns) is None else "ggml"


def open_axes(matrix: Matrix) -> tuple[int, ...]:
    """Lengths of the stack axes that have no index yet: () for one matrix, (experts,) for the experts of a layer."""
    plane = LAYOUTS[matrix.memory_layout].plane_shapes(matrix.format, matrix.rows, matrix.columns)[0]
    return matrix.planes[0].shape[len(matrix.index) : matrix.planes[0].ndim - len(plane.shape)]


def unpack_rows(matrix: Matrix, start: jax.Array | int, count: int) -> jax.Array:
    """Rows start .. start + count - 1 of the matrix, unpacked: float32 [count, columns]."""
    layout = LAYOUTS[matrix.memory_layout]
    planes = layout.rows(matrix.planes, matrix.index, start, count)
    return layout.decode(planes, matrix.format, count, matrix.columns)


def gather_rows(matrix: Matrix, ids: jax.Array) -> jax.Array:
    """The rows `ids` int32 [t] of a matrix without stack axes, unpacked: float32 [t, columns]."""
    layout = LAYOUTS[matrix.memory_layout]
    return layout.decode(layout.gather(matrix.planes, ids), matrix.format, ids.shape[0], matrix.columns)
