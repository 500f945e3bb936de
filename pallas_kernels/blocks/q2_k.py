"""Q2_K: 256 weights of 2 bits; 16 groups of 16, each with a 4-bit scale and a 4-bit offset.

    16 bytes s | 64 bytes q | half d | half dmin        w = d * scale * q - dmin * offset

Byte i of s holds the scale (low) and the offset (high) of group i. The first 128 weights have 32 bytes of q: weights 32 k + j,
k = 0..3, are bits 2 k, 2 k + 1 of byte j. Widths: 11 + 4 + 2 and 11 + 4 bits, one rounding.
"""

import jax

from .format import BlockFormat, join, split, take, take_half, to_float, two_groups


def _decode(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 84)
    d, dmin = take_half(blocks, 80), take_half(blocks, 82)
    pieces = []
    for run in range(8):  # 32 weights: two groups
        half, k = divmod(run, 4)
        scales = two_groups(take(blocks, 2 * run), take(blocks, 2 * run + 1))
        q = (take(blocks, 16 + 32 * half, 32) >> (2 * k)) & 3
        pieces.append(d * to_float(scales & 15) * to_float(q) - dmin * to_float(scales >> 4))
    return join(pieces)


Q2_K = BlockFormat("Q2_K", 10, 256, 84, _decode)
