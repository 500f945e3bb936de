"""Layout "ggml": blocks as in the file, one array [*stack, rows, stored width]. CPUs read it, and every format has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from . import format_of

NAME = "ggml"
AXES = 0, 1


def fits(format: str, n: int, k: int) -> str | None:
    """Always None: every matrix of a file fits this memory layout."""
    return None


def unit(format: str) -> int:
    """How many weights of a row can be kept without the rest of it."""
    return format_of(format).block_size


def plane_shapes(format: str, n: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of the one plane of a matrix [n, k]."""
    known = format_of(format)
    return (jax.ShapeDtypeStruct((n, known.stored_width(k)), known.storage),)


def pack(stored: jax.Array, format: str) -> tuple[jax.Array, ...]:
    """The blocks, unchanged."""
    return (stored,)


def decode(planes: tuple[jax.Array, ...], format: str, n: int, k: int) -> jax.Array:
    """float32 [n, k]."""
    return format_of(format).decode(planes[0])


def rows(
    planes: tuple[jax.Array, ...], index: tuple[jax.Array, ...], start: jax.Array | int, count: int
) -> tuple[jax.Array, ...]:
    """The planes of rows start .. start + count - 1 of the matrix at `index`."""
    (stored,) = planes
    sizes = (1,) * len(index) + (count, stored.shape[-1])
    part = lax.dynamic_slice(stored, (*index, jnp.asarray(start, jnp.int32), jnp.zeros((), jnp.int32)), sizes)
    return (part.reshape(sizes[-2:]),)


def gather(planes: tuple[jax.Array, ...], ids: jax.Array) -> tuple[jax.Array, ...]:
    """The planes of the rows `ids` [t] of one matrix."""
    # At least two rows: to take a single one, XLA on TPU would copy the whole array into another layout.
    return (planes[0][jnp.pad(ids, (0, 1))][:-1],) if ids.shape[0] == 1 else (planes[0][ids],)
