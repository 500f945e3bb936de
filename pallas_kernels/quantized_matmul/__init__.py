"""Compressed matmul: y = x · Wᵀ with W kept in ggml blocks.

Contract of `quantized_matmul(x, matrix)`:

* `x` [m, k] float32, bfloat16 or float16: its dtype is the arithmetic. float32 means float32 (`Precision.HIGHEST`). With
  `arithmetic` "int8" x is float32 and a backend may quantize it in blocks inside the product; with "int8x2" also the error of
  that quantization. Other backends stay exact.
* `matrix`: a `Matrix` [n, k] in any memory layout; its stack is never sliced into a copy.
* result [m, n] float32. Row i depends on row i of x alone; on CPU bit for bit, whatever m is.
* derivative: with respect to x, through the compressed weights; none with respect to the weights.

`quantized_matmuls(x, matrices)` is the same for several matrices that share x, in one launch if the backend can. `swiglu(x,
gate, up)` is silu(x · gateᵀ) * (x · upᵀ) in the dtype of x, without storing the two products if the backend can (arXiv
2002.05202).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import dispatch, native
from pallas_kernels.blocks.layouts import open_axes
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.ordered import is_ordered, natural
from pallas_kernels.derivatives import derivative_of, linear
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.reductions import silu

BACKENDS = (
    dispatch.Backend("native", native.refuses, lambda: native),
    dispatch.kernels("triton", __name__, "gpu"),
    dispatch.kernels("mosaic_tpu", __name__, "tpu"),
    dispatch.Backend("xla", lambda case: None, lambda: xla),
)
SWIGLU_BACKENDS = (*BACKENDS, dispatch.composed("quantized_matmul"))


def quantized_matmul(
    x: jax.Array, matrix: Matrix, arithmetic: str = "", implementation: dispatch.Implementation = None
) -> jax.Array:
    """x times the transposed matrix. See the module's contract.

    Args:
      x: [m, k].
      matrix: [n, k], compressed.
      arithmetic: "int8" or "int8x2"; "": the dtype of x.
      implementation: the backend to take instead of the first that can.

    Returns:
      float32 [m, n].

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    return quantized_matmuls(x, (matrix,), arithmetic, implementation)[0]


def quantized_matmuls(
    x: jax.Array, matrices: Sequence[Matrix], arithmetic: str = "", implementation: dispatch.Implementation = None
) -> list[jax.Array]:
    """x times each transposed matrix, in one launch if the backend can.

    Args:
      x: [m, k].
      matrices: each [n_i, k], compressed.
      arithmetic: as for `quantized_matmul`.
      implementation: as for `quantized_matmul`.

    Returns:
      float32 [m, n_i] for each.

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    _check("quantized_matmul", x, *matrices)
    if any(map(is_ordered, matrices)):
        one_by_one = (natural(x, matrix) for matrix in matrices)
        return [quantized_matmuls(columns, (stored,), arithmetic, implementation)[0] for columns, stored in one_by_one]
    return list(_matmuls(x, tuple(matrices), dispatch.target("quantized_matmul", implementation), arithmetic or x.dtype.name))


def swiglu(
    x: jax.Array, gate: Matrix, up: Matrix, arithmetic: str = "", implementation: dispatch.Implementation = None
) -> jax.Array:
    """silu(x · gateᵀ) * (x · upᵀ).

    Args:
      x: [m, k].
      gate: [n, k], compressed.
      up: [n, k], compressed.
      arithmetic: as for `quantized_matmul`.
      implementation: the backend to take; may be "composed".

    Returns:
      [m, n] in the dtype of x.

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    _check("swiglu", x, gate, up)
    if gate.rows != up.rows:
        raise ValueError(f"swiglu: gate {gate} and up {up} do not fit")
    target = dispatch.target("swiglu", implementation)
    if is_ordered(gate) or is_ordered(up):
        gated, plain = quantized_matmuls(x, (gate, up), arithmetic, target.forced)
        return (silu(gated) * plain).astype(x.dtype)
    return _swiglu(x, gate, up, target, arithmetic or x.dtype.name)


def _check(operation: str, x: jax.Array, *matrices: Matrix) -> None:
    for matrix in matrices:
        if x.ndim != 2 or x.shape[1] != matrix.columns or matrix.planes[0].ndim < len(matrix.index) or open_axes(matrix):
            raise ValueError(
                f"{operation}: x {x.shape} and {matrix} with planes {matrix.planes[0].shape} and {len(matrix.index)} indices "
                "do not fit"
            )


def backend_for(
    operation: str,
    x: jax.Array,
    matrices: Sequence[Matrix],
    target: dispatch.Target,
    arithmetic: str,
    backends: Sequence[dispatch.Backend],
    features: tuple[str, ...] = (),
) -> Any:
    """The functions of the backend that serves all the matrices in one call, or None if no single backend does. features: as
    of dispatch.Case."""

    def case(m: Matrix) -> dispatch.Case:
        sizes = x.shape[0], m.rows, m.columns
        return dispatch.Case(operation, target, m.format, arithmetic, m.memory_layout, sizes, features)

    found = [dispatch.choose(case(matrix), backends) for matrix in matrices]
    return found[0] if all(one is found[0] for one in found) else None


def _transposed(dys: Sequence[jax.Array], matrices: Sequence[Matrix], target: dispatch.Target, arithmetic: str) -> jax.Array:
    parts = (xla.matmul_transposed(dy, matrix, target) for dy, matrix in zip(dys, matrices, strict=True))
    return functools.reduce(jax.numpy.add, parts)


@linear(_transposed, static=("target", "arithmetic"))
def _matmuls(x: jax.Array, matrices: Sequence[Matrix], target: dispatch.Target, arithmetic: str) -> tuple[jax.Array, ...]:
    together = backend_for("quantized_matmul", x, matrices, target, arithmetic, BACKENDS)
    if together is not None:
        twice = getattr(together, "matmuls_twice", together.matmuls)
        return tuple((twice if arithmetic == "int8x2" else together.matmuls)(x, matrices, target))
    return tuple(_matmuls(x, (matrix,), target, arithmetic)[0] for matrix in matrices)


def _composed_swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    gated, plain = _matmuls(x, (gate, up), target, arithmetic)
    return (silu(gated) * plain).astype(x.dtype)


@derivative_of(_composed_swiglu, of=("x",), static=("target", "arithmetic"))
def _swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    together = backend_for("swiglu", x, (gate, up), target, arithmetic, SWIGLU_BACKENDS)
    return (together.swiglu if together else functools.partial(_composed_swiglu, arithmetic=arithmetic))(x, gate, up, target)
