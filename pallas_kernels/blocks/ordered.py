"""Any memory layout with its columns in another order: one more plane says which column of the matrix each stored column is.

GPTQ with `desc_act` sorts columns by activation before it cuts them into groups. Stored in that order, groups are runs of
columns and every block format fits. Then only the columns of x must be taken in that order (`natural`, `natural_rows`): one
gather of activations before any kernel, which then gets an ordinary matrix.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax

from .matrix import Matrix

SUFFIX = "+order"


class Ordered:
    """The memory layout `inner` with the additional plane `order` int32 [columns] at the end: stored column c is column
    order[c]."""

    def __init__(self, inner: ModuleType) -> None:
        self.NAME, self.AXES, self.inner = inner.NAME + SUFFIX, inner.AXES, inner

    def fits(self, format: str, n: int, k: int) -> str | None:
        """As the inner memory layout."""
        return self.inner.fits(format, n, k)

    def plane_shapes(self, format: str, n: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The inner planes and the order."""
        return (*self.inner.plane_shapes(format, n, k), jax.ShapeDtypeStruct((k,), jnp.int32))

    def decode(self, planes: tuple[jax.Array, ...], format: str, n: int, k: int) -> jax.Array:
        """float32 [n, k], the columns in the order of the matrix."""
        return self.inner.decode(planes[:-1], format, n, k)[:, jnp.argsort(planes[-1])]

    def rows(
        self, planes: tuple[jax.Array, ...], index: tuple[jax.Array, ...], start: jax.Array | int, count: int
    ) -> tuple[jax.Array, ...]:
        """The planes of rows start .. start + count - 1 of the matrix at `index`."""
        return (*self.inner.rows(planes[:-1], index, start, count), planes[-1][index])

    def gather(self, planes: tuple[jax.Array, ...], ids: jax.Array) -> tuple[jax.Array, ...]:
        """The planes of the rows `ids` [t] of one matrix."""
        return (*self.inner.gather(planes[:-1], ids), planes[-1])


def is_ordered(matrix: Matrix) -> bool:
    """Whether the columns of the matrix are stored in another order."""
    return matrix.memory_layout.endswith(SUFFIX)


def natural(x: jax.Array, matrix: Matrix) -> tuple[jax.Array, Matrix]:
    """x [m, k] and the matrix as an ordinary one, with the same product."""
    if not is_ordered(matrix):
        return x, matrix
    return _apart(x[:, matrix.planes[-1][matrix.index]]), _stored(matrix)


def natural_rows(x: jax.Array, group_sizes: jax.Array, matrix: Matrix) -> tuple[jax.Array, Matrix]:
    """`natural` for rows of x [m, k] sorted by expert, each in the order of its own expert's columns."""
    if not is_ordered(matrix):
        return x, matrix
    ends = jnp.cumsum(group_sizes)
    expert = jnp.sum(jnp.arange(x.shape[0])[:, None] >= ends[None, :], axis=1)
    orders = matrix.planes[-1][matrix.index]  # [experts, k]
    return _apart(jnp.take_along_axis(x, orders[jnp.minimum(expert, orders.shape[0] - 1)], axis=1)), _stored(matrix)


def _apart(x: jax.Array) -> jax.Array:
    """x with a barrier, so that XLA does not merge the gather into the product: on CPU it cannot multiply gathered bfloat16."""
    return lax.optimization_barrier(x)


def _stored(matrix: Matrix) -> Matrix:
    return dataclasses.replace(matrix, planes=matrix.planes[:-1], memory_layout=matrix.memory_layout.removesuffix(SUFFIX))
