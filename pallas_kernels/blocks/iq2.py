"""IQ2_XXS, IQ2_XS, IQ2_S: 256 weights of 2 to 2.6 bits: rows of a grid of 8 magnitudes, and signs.

    IQ2_XXS   half d | 8 x (4 bytes rows | word: 4 x 7 signs, 4-bit scale)
    IQ2_XS    half d | 32 words of 16 bits: 9-bit row, 7 signs | 8 bytes scales
    IQ2_S     half d | 32 bytes rows | 32 bytes signs | 8 bytes high bits of rows | 8 bytes scales

w = d * (2 scale + 1) / 8 * magnitude, with magnitudes 8, 25, 43. A scale serves 32 weights (IQ2_XXS) or 16. Seven
signs mean eight, the last of even parity. Widths: 11 + 5 + 6 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .format import BlockFormat, flatten, split, spread, take, take_half, take_words, to_float
from .grids import Integers, even_signs, look_up, signed_weights
from .tables import IQ2_S_GRID, IQ2_XS_GRID, IQ2_XXS_GRID


def magnitudes(codes: Integers) -> Integers:
    """8, 25 or 43 for codes 0, 1, 2."""
    return 8 + 17 * codes + (codes >> 1)


def _weights(d: jax.Array, scales: jax.Array, codes: jax.Array, signs: jax.Array) -> jax.Array:
    """d [..., 1]; scales, codes and signs int32 [..., blocks, 32], for each group of 8 weights."""
    scale = d * to_float(2 * scales + 1) * np.float32(0.125)
    return signed_weights(scale[..., None], magnitudes(spread(codes, 8, 2)), spread(signs, 8, 1))


def _nibbles(blocks: jax.Array, start: int) -> jax.Array:
    """Scales of 16 weights each in 8 bytes, int32 [..., blocks, 32]: every one for its two groups of 8."""
    return jnp.repeat(flatten(spread(take(blocks, start, 8), 2, 4), 2), 2, axis=-1)


def _decode_iq2_xxs(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 66)
    rows = blocks[..., 2:].reshape(*blocks.shape[:-1], 8, 8)[..., :4].astype(jnp.int32)
    words = take_words(blocks, 6, 8, width=4, stride=8)
    signs = ((words[..., None] >> (7 * jnp.arange(4, dtype=jnp.uint32))) & 127).astype(jnp.int32)
    scales = jnp.repeat((words >> 28).astype(jnp.int32), 4, axis=-1)
    codes = look_up(IQ2_XXS_GRID, flatten(rows, 2))
    return _weights(take_half(blocks, 0), scales, codes, even_signs(flatten(signs, 2)))


def _decode_iq2_xs(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 74)
    words = take_words(blocks, 2, 32, width=2).astype(jnp.int32)
    codes = look_up(IQ2_XS_GRID, words & 511)
    return _weights(take_half(blocks, 0), _nibbles(blocks, 66), codes, even_signs(words >> 9))


def _decode_iq2_s(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 82)
    high = flatten(spread(take(blocks, 66, 8), 4, 2), 2)
    codes = look_up(IQ2_S_GRID, take(blocks, 2, 32) | (high << 8))
    return _weights(take_half(blocks, 0), _nibbles(blocks, 74), codes, take(blocks, 34, 32))


IQ2_XXS = BlockFormat("IQ2_XXS", 16, 256, 66, _decode_iq2_xxs)
IQ2_XS = BlockFormat("IQ2_XS", 17, 256, 74, _decode_iq2_xs)
IQ2_S = BlockFormat("IQ2_S", 22, 256, 82, _decode_iq2_s)
