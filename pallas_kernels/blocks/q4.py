"""Q4_0 and Q4_1: 32 weights of 4 bits under one scale.

    Q4_0   half d | 16 bytes          w = d * (q - 8)        11 + 3 bits
    Q4_1   half d | half m | 16 bytes w = d * q + m          11 + 4 bits, one rounding

Byte j holds weight j in its low and weight j + 16 in its high four bits.
"""

import jax

from .format import BlockFormat, join, split, take, take_half, to_float


def _decode_q4_0(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 18)
    d, q = take_half(blocks, 0), take(blocks, 2, 16)
    return join([d * to_float((q & 15) - 8), d * to_float((q >> 4) - 8)])


def _decode_q4_1(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 20)
    d, m, q = take_half(blocks, 0), take_half(blocks, 2), take(blocks, 4, 16)
    return join([d * to_float(q & 15) + m, d * to_float(q >> 4) + m])


Q4_0 = BlockFormat("Q4_0", 2, 32, 18, _decode_q4_0)
Q4_1 = BlockFormat("Q4_1", 3, 32, 20, _decode_q4_1)
