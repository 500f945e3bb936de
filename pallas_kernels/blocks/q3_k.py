"""Q3_K: 256 weights of 3 bits; 16 groups of 16, each with a 6-bit signed scale.

    32 bytes h | 64 bytes q | 12 bytes s | half d        w = d * (scale - 32) * (q + 4 h - 4)

The low two bits are stored as in Q2_K; the third bit of weight 32 r + j is bit r of byte j of h. Scale i has its low four bits
in byte i % 8 of s (upper nibble from i = 8 on) and its high two in bits 2 (i / 4) of byte 8 + i % 4. Widths: 11 + 5 + 2 bits
(-32 and -4 are powers of two).
"""

import jax

from .format import BlockFormat, join, split, take, take_half, to_float, two_groups


def _scale(blocks: jax.Array, group: int) -> jax.Array:
    """Scale of `group`, int32 [..., blocks, 1]."""
    low = take(blocks, 96 + group % 8) >> (4 * (group // 8))
    high = take(blocks, 104 + group % 4) >> (2 * (group // 4))
    return ((low & 15) | ((high & 3) << 4)) - 32


def _decode(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 110)
    d = take_half(blocks, 108)
    third = take(blocks, 0, 32)
    pieces = []
    for run in range(8):  # 32 weights: two groups
        half, k = divmod(run, 4)
        scale = two_groups(_scale(blocks, 2 * run), _scale(blocks, 2 * run + 1))
        q = ((take(blocks, 32 + 32 * half, 32) >> (2 * k)) & 3) | (((third >> run) & 1) << 2)
        pieces.append(d * to_float(scale) * to_float(q - 4))
    return join(pieces)


Q3_K = BlockFormat("Q3_K", 11, 256, 110, _decode)
