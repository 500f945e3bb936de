"""Q5_K: 256 weights of 5 bits; scales and offsets as in Q4_K.

    half d | half dmin | 12 bytes s | 32 bytes h | 128 bytes q        w = d * scale * q - dmin * offset

The low four bits are stored as in Q4_K; the fifth bit of weight j of a group is bit `group` of byte j of h. Widths: 11 + 6 + 5
and 11 + 6 bits, one rounding.
"""

import jax

from .format import BlockFormat, join, split, take, take_half, to_float
from .q4_k import group_scales


def _decode(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 176)
    d, dmin = take_half(blocks, 0), take_half(blocks, 2)
    fifth = take(blocks, 16, 32)
    pieces = []
    for group in range(8):
        scale, offset = group_scales(blocks, group)
        q = (take(blocks, 48 + 32 * (group // 2), 32) >> (4 * (group % 2))) & 15
        q = q | (((fifth >> group) & 1) << 4)
        pieces.append(d * to_float(scale) * to_float(q) - dmin * to_float(offset))
    return join(pieces)


Q5_K = BlockFormat("Q5_K", 13, 256, 176, _decode)
