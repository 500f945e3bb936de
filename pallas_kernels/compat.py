"""The only file that touches names of Pallas and JAX that change between versions (0.10.2 to 0.12).

Triton kernels use only the few functions here: if a version of jax drops the Triton lowering, only this file changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

triton_load = pltriton.load
triton_store = pltriton.store


def triton_call(
    kernel: Callable,
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    interpret: bool = False,
    **options: Any,
) -> Callable:
    """A `pallas_call` lowered by Triton, over whole arrays. Keywords are those of `pallas_call`."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        name=name,
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **options,
    )


def triton_asm(body: str, *, args: Sequence[jax.Array], constraints: str, pack: int, result: jax.ShapeDtypeStruct) -> jax.Array:
    """Inline PTX on `pack` elements at a time (16-bit ones share a register) of arrays of one shape; one result."""
    return pltriton.elementwise_inline_asm(body, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result])[0]


def abstract_mesh(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    """Tracing for the devices of `mesh`, which need not exist: helpers that look up the device kind find it there."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def ragged_paged_attention(*args: Any, precision: str, **options: Any) -> jax.Array:
    """jax's TPU kernel; `precision` of its products, as in `jax.default_matmul_precision`."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    with jax.default_matmul_precision(precision):
        return ragged_paged_attention(*args, **options)
