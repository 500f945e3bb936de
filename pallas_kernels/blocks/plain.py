"""F32, F16, BF16: one number per weight, without blocks.

F16 and BF16 are kept on the device as their 16 bits: XLA on CPU silently widens whole bfloat16 arrays, and some backends cannot
load float16. bfloat16 is the upper half of a float32, so decoding it is a shift.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .format import BlockFormat, half_to_float32


def bfloat16_to_float32(bits: jax.Array) -> jax.Array:
    """uint16 bfloat16 bits to float32, exactly."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


F32 = BlockFormat("F32", 0, 1, 4, lambda stored: stored, np.dtype(np.float32))
F16 = BlockFormat("F16", 1, 1, 2, half_to_float32, np.dtype(np.uint16))
BF16 = BlockFormat("BF16", 30, 1, 2, bfloat16_to_float32, np.dtype(np.uint16))
