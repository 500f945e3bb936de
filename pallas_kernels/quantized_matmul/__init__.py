"""Compressed matmul: y = x · Wᵀ with W kept in ggml blocks.

Contract of `quantized_matmul(x, stored, index, format)`:

* `x` [m, k] float32, bfloat16 or float16: its dtype is the arithmetic. float32 means float32 (`Precision.HIGHEST`).
* `stored` [*stack, n, width]: `BlockFormat.storage` values of the format, width = `stored_width(k)`. Leading axes are
  stacks (layers, experts); `index` holds one int32 scalar for each, so that no slice is made into a copy.
* result [m, n] float32. Row i depends on row i of x alone, bit for bit, whatever m is.
* derivative: with respect to x, through the compressed weights; the weights have none.

`quantized_matmul_transposed(dy, stored, index, format)` is that derivative: [m, n] -> float32 [m, k].
Raises ValueError when widths do not fit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import FORMATS
from pallas_kernels.quantized_matmul import xla

BACKENDS = (dispatch.Backend("xla", lambda case: None, xla),)

Index = tuple[jax.Array | int, ...]


def quantized_matmul(x: jax.Array, stored: jax.Array, index: Index, format: str) -> jax.Array:
    """x [m, k] times the transposed matrix `stored[index]` [n, k]; float32 [m, n]. See the module's contract."""
    width = FORMATS[format].stored_width(x.shape[-1])
    if x.ndim != 2 or stored.ndim != 2 + len(index) or stored.shape[-1] != width:
        raise ValueError(
            f"quantized_matmul: x {x.shape} and {format} weights {stored.shape} with {len(index)} indices do not fit: "
            f"rows of {x.shape[-1]} weights take {width} stored values"
        )
    return _matmul(x, stored, tuple(jnp.asarray(i, jnp.int32) for i in index), format)


def _backend(x: jax.Array, format: str):
    case = dispatch.Case("quantized_matmul", jax.default_backend(), format, x.dtype.name)
    return dispatch.choose(case, BACKENDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, stored, index, format):
    return _backend(x, format).matmul(x, stored, index, FORMATS[format])


def _forward(x, stored, index, format):
    return _matmul(x, stored, index, format), (jnp.zeros((), x.dtype), stored, index)


def _backward(format, residuals, dy):
    like, stored, index = residuals
    dx = _backend(like, format).matmul_transposed(dy.astype(like.dtype), stored, index, FORMATS[format])
    return dx.astype(like.dtype), None, None


_matmul.defvjp(_forward, _backward)
