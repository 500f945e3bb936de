"""Q8_0: 32 weights of 8 bits under one scale.

half d | 32 int8 q        w = d * q        11 + 7 bits
"""

import jax

from .format import BlockFormat, join, split, take_half, take_signed, to_float


def _decode_q8_0(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 34)
    d = take_half(blocks, 0)
    return join([d * to_float(take_signed(blocks, 2 + start, 16)) for start in (0, 16)])


Q8_0 = BlockFormat("Q8_0", 8, 32, 34, _decode_q8_0)
