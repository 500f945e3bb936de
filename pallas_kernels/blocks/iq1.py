"""IQ1_S and IQ1_M: 256 weights of 1.6 and 1.75 bits: rows of a ternary grid, shifted by an eighth.

    IQ1_S   half d | 32 bytes rows | 8 words of 16 bits: 4 x 3 high bits of rows, 3-bit scale, sign of the shift
    IQ1_M   32 bytes rows | 16 bytes: nibbles of 3 high bits and sign | 4 words of 16 bits: 4 x 3-bit scales, part of d

w = d * (2 scale + 1) * (t + shift), t in -1, 0, 1, shift = 1/8 or, with its sign bit set, -1/8. IQ1_S has one scale
and shift for 32 weights, IQ1_M a scale for 16 and a shift for 8. The top nibbles of IQ1_M's four words are d, lowest
first. Widths: 11 + 4 + 4 bits (t + shift is an integer of eighths, at most 9).
"""

import jax
import jax.numpy as jnp
import numpy as np

from .format import BlockFormat, flatten, half_to_float32, split, spread, take, take_half, take_words, to_float
from .grids import look_up
from .tables import IQ1_S_GRID


def _weights(d: jax.Array, scales: jax.Array, rows: jax.Array, negative: jax.Array) -> jax.Array:
    """d [..., 1]; scales, rows and shift signs int32 [..., blocks, 32], for each group of 8 weights."""
    scale = d * to_float(2 * scales + 1) * np.float32(0.125)
    shift = 1 - 2 * negative
    eighths = 8 * (spread(look_up(IQ1_S_GRID, rows), 8, 2) - 1) + shift[..., None]
    return flatten(scale[..., None] * to_float(eighths), 3)


def _decode_iq1_s(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 50)
    words = take_words(blocks, 34, 8, width=2).astype(jnp.int32)
    high = flatten(spread(words, 4, 3), 2)
    words = jnp.repeat(words, 4, axis=-1)
    return _weights(take_half(blocks, 0), (words >> 12) & 7, take(blocks, 2, 32) | (high << 8), words >> 15)


def _decode_iq1_m(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 56)
    words = take_words(blocks, 48, 4, width=2).astype(jnp.int32)
    tops = [take(blocks, 49 + 2 * word) >> 4 for word in range(4)]
    bits = tops[0] | (tops[1] << 4) | (tops[2] << 8) | (tops[3] << 12)
    nibbles = flatten(spread(take(blocks, 32, 16), 2, 4), 2)
    scales = flatten(spread(words, 4, 3), 2)
    rows = take(blocks, 0, 32) | ((nibbles & 7) << 8)
    d = half_to_float32(bits.astype(jnp.uint16))
    return _weights(d, jnp.repeat(scales, 2, axis=-1), rows, nibbles >> 3)


IQ1_S = BlockFormat("IQ1_S", 19, 256, 50, _decode_iq1_s)
IQ1_M = BlockFormat("IQ1_M", 29, 256, 56, _decode_iq1_m)
