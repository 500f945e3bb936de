"""IQ4_NL and IQ4_XS: 4 bits per weight select one of 16 unevenly spaced levels.

    IQ4_NL   half d | 16 bytes q                               w = d * level[q]                  11 + 7 bits
    IQ4_XS   half d | 2 bytes sh | 4 bytes sl | 128 bytes q    w = d * (scale - 32) * level[q]   11 + 5 + 7 bits

IQ4_NL has 32 weights laid out as in Q4_0. IQ4_XS has 256: eight groups of 32, each laid out so, with a 6-bit scale
whose low four bits are nibble `group` of sl and whose high two are bits 2 `group` of sh.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .format import BlockFormat, flatten, join, split, spread, take, take_half, to_float

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def level(index: jax.Array) -> jax.Array:
    """LEVELS[index], index in 0..15, by selects and a shift, which vectorize (a gather would not)."""
    words = [sum((LEVELS[4 * w + i] & 255) << (8 * i) for i in range(4)) for w in range(4)]
    lower = jnp.where(index < 4, jnp.uint32(words[0]), jnp.uint32(words[1]))
    upper = jnp.where(index < 12, jnp.uint32(words[2]), jnp.uint32(words[3]))
    word = lax.bitcast_convert_type(jnp.where(index < 8, lower, upper), jnp.int32)
    return (word << (24 - 8 * (index & 3))) >> 24


def _decode_iq4_nl(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 18)
    d, q = take_half(blocks, 0), take(blocks, 2, 16)
    return join([d * to_float(level(q & 15)), d * to_float(level(q >> 4))])


def _decode_iq4_xs(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 136)
    low = flatten(spread(take(blocks, 4, 4), 2, 4), 2)
    high = flatten(spread(take(blocks, 2, 2), 4, 2), 2)
    scale = (take_half(blocks, 0) * to_float((low | (high << 4)) - 32))[..., None]
    q = take(blocks, 8, 128).reshape(*blocks.shape[:-1], 8, 16)
    return join([scale * to_float(level(q & 15)), scale * to_float(level(q >> 4))], axes=3)


IQ4_NL = BlockFormat("IQ4_NL", 20, 32, 18, _decode_iq4_nl)
IQ4_XS = BlockFormat("IQ4_XS", 23, 256, 136, _decode_iq4_xs)
