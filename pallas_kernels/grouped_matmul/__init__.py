"""Ragged grouped matmul over compressed experts: each run of rows is multiplied by its own expert's matrix.

Contract of `grouped_matmul(x, group_sizes, stored, index, format)`:

* `x` [m, k], rows sorted by expert; its dtype is the arithmetic, as in quantized_matmul.
* `group_sizes` int32 [E]: how many rows each expert has. Rows beyond their sum belong to nobody: their results are zero.
* `stored` [*stack, E, n, width]; `index` holds one int32 scalar for each axis of the stack.
* result [m, n] float32. An expert without rows is neither unpacked nor multiplied: what its blocks hold cannot matter,
  and time and temporaries do not grow with the number of experts. Row i depends on row i of x and its expert alone.
* derivative: with respect to x.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import FORMATS
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.quantized_matmul import Index

BACKENDS = (dispatch.Backend("xla", lambda case: None, xla),)


def grouped_matmul(x: jax.Array, group_sizes: jax.Array, stored: jax.Array, index: Index, format: str) -> jax.Array:
    """Row r of x [m, k] times its expert's matrix, transposed; float32 [m, n]. See the module's contract."""
    width = FORMATS[format].stored_width(x.shape[-1])
    if x.ndim != 2 or stored.ndim != 3 + len(index) or stored.shape[-1] != width:
        raise ValueError(
            f"grouped_matmul: x {x.shape} and {format} experts {stored.shape} with {len(index)} indices do not fit: "
            f"rows of {x.shape[-1]} weights take {width} stored values"
        )
    if group_sizes.shape != stored.shape[-3:-2]:
        raise ValueError(f"grouped_matmul: group_sizes {group_sizes.shape} for {stored.shape[-3]} experts")
    return _grouped(x, group_sizes, stored, tuple(jnp.asarray(i, jnp.int32) for i in index), format)


def _backend(x: jax.Array, format: str):
    case = dispatch.Case("grouped_matmul", jax.default_backend(), format, x.dtype.name)
    return dispatch.choose(case, BACKENDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x, group_sizes, stored, index, format):
    return _backend(x, format).grouped(x, group_sizes, stored, index, FORMATS[format], transposed=False)


def _forward(x, group_sizes, stored, index, format):
    return _grouped(x, group_sizes, stored, index, format), (jnp.zeros((), x.dtype), group_sizes, stored, index)


def _backward(format, residuals, dy):
    like, group_sizes, stored, index = residuals
    backend = _backend(like, format)
    dx = backend.grouped(dy.astype(like.dtype), group_sizes, stored, index, FORMATS[format], transposed=True)
    return dx.astype(like.dtype), None, None, None


_grouped.defvjp(_forward, _backward)
