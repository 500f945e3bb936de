"""What the IQ1, IQ2 and IQ3 formats share: looking up rows of a grid, and applying signs to the weights.

A row of a grid gives the magnitudes of 8 (IQ3: 4) neighboring weights. It is stored as one integer of codes
(tables.py), so a gather fetches one number for 8 weights, and shifts do the rest.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .format import flatten, to_float

Integers = TypeVar("Integers", jax.Array, np.ndarray)


def look_up(grid: np.ndarray, rows: jax.Array) -> jax.Array:
    """Codes of the given rows of a grid, int32; `rows` are in range by their number of bits."""
    return jnp.asarray(grid.astype(np.int32)).at[rows].get(mode="promise_in_bounds")


def even_signs(seven: Integers) -> Integers:
    """Eight sign bits of seven: the highest makes their number even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    return seven | (((parity ^ (parity >> 1)) & 1) << 7)


def signed_weights(scale: jax.Array, magnitudes: jax.Array, signs: jax.Array) -> jax.Array:
    """scale * magnitude, negative where its sign bit is set.

    scale float32, magnitudes and sign bits int32, broadcast against [..., blocks, groups, 8] -> [..., weights].
    """
    return flatten(scale * to_float(jnp.where(signs == 1, -magnitudes, magnitudes)), 3)
