"""Q4_K: 256 weights of 4 bits; 8 groups of 32, each with a 6-bit scale and a 6-bit offset.

    half d | half dmin | 12 bytes s | 128 bytes q        w = d * scale * q - dmin * offset

Groups 2 i and 2 i + 1 share 32 bytes of q: low and high four bits. Widths: 11 + 6 + 4 and 11 + 6 bits, one rounding.
"""

import jax

from .format import BlockFormat, join, split, take, take_half, to_float


def group_scales(blocks: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Scale and offset of `group` (0..7), int32 [..., blocks, 1] each; also Q5_K's.

    Groups 0..3 have six plain bits: the scale in byte `group` of s, the offset in byte `group + 4`. The upper two bits
    of those bytes are the high bits of groups 4..7, whose low four bits share byte `group + 4`.
    """
    if group < 4:
        return take(blocks, 4 + group) & 63, take(blocks, 8 + group) & 63
    low = take(blocks, 8 + group)
    scale_high, offset_high = take(blocks, group) >> 6, take(blocks, 4 + group) >> 6
    return (low & 15) | (scale_high << 4), (low >> 4) | (offset_high << 4)


def _decode(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 144)
    d, dmin = take_half(blocks, 0), take_half(blocks, 2)
    pieces = []
    for group in range(8):
        scale, offset = group_scales(blocks, group)
        q = (take(blocks, 16 + 32 * (group // 2), 32) >> (4 * (group % 2))) & 15
        pieces.append(d * to_float(scale) * to_float(q) - dmin * to_float(offset))
    return join(pieces)


Q4_K = BlockFormat("Q4_K", 12, 256, 144, _decode)
