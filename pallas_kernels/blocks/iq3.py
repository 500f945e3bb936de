"""IQ3_XXS and IQ3_S: 256 weights of 3.1 and 3.4 bits: rows of a grid of 4 magnitudes, and signs.

    IQ3_XXS   half d | 64 bytes rows | 8 words: 4 x 7 signs, 4-bit scale
    IQ3_S     half d | 64 bytes rows | 8 bytes ninth bits of rows | 32 bytes signs | 4 bytes scales

IQ3_XXS: w = d * (2 scale + 1) / 4 * magnitude, with magnitudes 4, 12, 20, 28, 36, 44, 52, 62; seven signs mean eight,
the last of even parity. IQ3_S: w = d * (2 scale + 1) * magnitude, with magnitudes 1, 3, ..., 15. A scale serves 32
weights. Widths: 11 + 5 + 5 bits (62 is twice 31).
"""

import jax
import jax.numpy as jnp
import numpy as np

from .format import BlockFormat, flatten, split, spread, take, take_half, take_words, to_float
from .grids import Integers, even_signs, look_up, signed_weights
from .tables import IQ3_S_GRID, IQ3_XXS_GRID


def xxs_magnitudes(codes: Integers) -> Integers:
    """4, 12, ..., 52, 62 for codes 0 to 7."""
    return 4 + 8 * codes + 2 * (codes // 7)


def s_magnitudes(codes: Integers) -> Integers:
    """1, 3, ..., 15 for codes 0 to 7."""
    return 1 + 2 * codes


def _decode_iq3_xxs(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 98)
    words = take_words(blocks, 66, 8, width=4)
    scale = take_half(blocks, 0) * to_float(2 * (words >> 28) + 1) * np.float32(0.25)
    signs = ((words[..., None] >> (7 * jnp.arange(4, dtype=jnp.uint32))) & 127).astype(jnp.int32)
    magnitudes = xxs_magnitudes(spread(look_up(IQ3_XXS_GRID, take(blocks, 2, 64)), 4, 3))
    return signed_weights(
        jnp.repeat(scale, 4, axis=-1)[..., None],
        magnitudes.reshape(*blocks.shape[:-1], 32, 8),
        spread(even_signs(flatten(signs, 2)), 8, 1),
    )


def _decode_iq3_s(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 110)
    scales = flatten(spread(take(blocks, 106, 4), 2, 4), 2)
    scale = take_half(blocks, 0) * to_float(2 * scales + 1)
    ninth = flatten(spread(take(blocks, 66, 8), 8, 1), 2)
    magnitudes = s_magnitudes(spread(look_up(IQ3_S_GRID, take(blocks, 2, 64) | (ninth << 8)), 4, 3))
    return signed_weights(
        jnp.repeat(scale, 4, axis=-1)[..., None],
        magnitudes.reshape(*blocks.shape[:-1], 32, 8),
        spread(take(blocks, 74, 32), 8, 1),
    )


IQ3_XXS = BlockFormat("IQ3_XXS", 18, 256, 98, _decode_iq3_xxs)
IQ3_S = BlockFormat("IQ3_S", 21, 256, 110, _decode_iq3_s)
