"""The operand of every weight operation: a compressed matrix inside its stack.

Matrices of many layers (and experts) share stacked arrays, and none is ever sliced out: a `Matrix` consists of the whole arrays
and an index, which only the operation that reads the blocks applies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import format_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """W [rows, columns], or one for each expert if one stack axis more remains than `index` has scalars.

    planes: arrays [*stack, *plane]: the memory layout says what a plane holds (see layouts.py); in "ggml" there is
    one array of the format's `storage`, [*stack, rows, stored_width(columns)]. index: int32 scalars for the leading axes
    of the stack. rows, columns: in weights.
    """

    planes: tuple[jax.Array, ...]
    index: tuple[jax.Array, ...]
    format: str = dataclasses.field(metadata={"static": True})
    memory_layout: str = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, stored: jax.Array, format: str, index: Sequence[ArrayLike] = ()) -> Matrix:
        """From blocks in file order: `stored` [*stack, rows, stored_width(columns)] of `format_of(format).storage`."""
        known = format_of(format)
        columns = stored.shape[-1] * known.storage.itemsize // known.block_bytes * known.block_size
        return cls((stored,), (), format, "ggml", stored.shape[-2], columns).at(*index)

    def at(self, *index: ArrayLike) -> Matrix:
        """The matrix at `index` of the leading stack axes that are left."""
        return dataclasses.replace(self, index=(*self.index, *(jnp.asarray(i, jnp.int32) for i in index)))

    def __str__(self) -> str:
        return f"{self.format} [{self.rows}, {self.columns}]"
