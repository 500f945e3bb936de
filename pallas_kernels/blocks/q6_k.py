"""Q6_K: 256 weights of 6 bits; 16 groups of 16, each with an int8 scale.

    128 bytes l | 64 bytes h | 16 int8 s | half d        w = d * scale * (q - 32)

The first 128 weights have 64 bytes of l and 32 of h, the others the rest. Within such a half, the low four bits of weight 32 k
+ j (k = 0..3) are in byte 32 (k % 2) + j of l, in its upper four bits from k = 2 on, and the high two are bits 2 k, 2 k + 1 of
byte j of h. Widths: 11 + 7 + 5 bits (-128 and -32 are powers of two).
"""

import jax

from .format import BlockFormat, join, split, take, take_half, take_signed, to_float, two_groups


def _decode(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 210)
    d = take_half(blocks, 208)
    pieces = []
    for run in range(8):  # 32 weights: two groups
        half, k = divmod(run, 4)
        scale = two_groups(take_signed(blocks, 192 + 2 * run), take_signed(blocks, 193 + 2 * run))
        low = (take(blocks, 64 * half + 32 * (k % 2), 32) >> (4 * (k // 2))) & 15
        high = (take(blocks, 128 + 32 * half, 32) >> (2 * k)) & 3
        pieces.append(d * to_float(scale) * to_float((low | (high << 4)) - 32))
    return join(pieces)


Q6_K = BlockFormat("Q6_K", 14, 256, 210, _decode)
