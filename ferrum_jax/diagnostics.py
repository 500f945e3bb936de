"""What would run here: the backends that the dispatcher takes on this machine, seen by tracing small operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import FORMATS
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_attention import Tables, make_plan, paged_attention
from pallas_kernels.quantized_matmul import quantized_matmul

_WIDTH = 256  # a multiple of every format's block


def trial(dtype: str = "float32") -> list[dispatch.Choice]:
    """Compiles each operation once, for every block format, in activations of `dtype`: the dispatcher's own record."""
    array = jax.ShapeDtypeStruct
    x, index, layer = array((4, _WIDTH), jnp.dtype(dtype)), array((), jnp.int32), array((), jnp.int32)
    with dispatch.record() as choices:
        for name, format in FORMATS.items():
            width = format.stored_width(_WIDTH)
            weights = array((1, 8, width), format.storage)
            experts = array((1, 2, 8, width), format.storage)
            _compile(lambda x, w, i, name=name: quantized_matmul(x, w, (i,), name), x, weights, index)
            sizes = array((2,), jnp.int32)
            _compile(lambda x, s, w, i, name=name: grouped_matmul(x, s, w, (i,), name), x, sizes, experts, index)
        pages = array((1, 2, 16, 2, 64), jnp.float32)
        positions, starts, lengths, table = (array(shape, jnp.int32) for shape in ((4,), (3,), (2,), (2, 1)))

        def attend(q, pages, layer, tables):
            return paged_attention(q, pages, pages, layer, make_plan(Tables(*tables), pages), 1.0)

        _compile(attend, array((4, 4, 64), jnp.float32), pages, layer, (positions, starts, lengths, table))
    return choices


def _compile(function, *arguments) -> None:
    jax.jit(function).lower(*arguments).compile()
