"""Q5_0 and Q5_1: 32 weights of 5 bits under one scale.

    Q5_0   half d | 4 bytes h | 16 bytes          w = d * (q - 16)     11 + 4 bits
    Q5_1   half d | half m | 4 bytes h | 16 bytes w = d * q + m        11 + 5 bits, one rounding

The low four bits are stored as in Q4_0; the fifth bit of weight j is bit j of the 32-bit word h.
"""

import jax
import jax.numpy as jnp

from .format import BlockFormat, join, split, take, take_half, to_float


def _quants(blocks: jax.Array, start: int) -> tuple[jax.Array, jax.Array]:
    """The 5-bit integers of weights 0..15 and 16..31, int32 [..., blocks, 16] each; h begins at byte `start`."""
    high = take(blocks, start, 4)
    low = take(blocks, start + 4, 16)
    lane = jnp.arange(16, dtype=jnp.int32)
    first = ((high[..., 0:1] | (high[..., 1:2] << 8)) >> lane) & 1
    second = ((high[..., 2:3] | (high[..., 3:4] << 8)) >> lane) & 1
    return (low & 15) | (first << 4), (low >> 4) | (second << 4)


def _decode_q5_0(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 22)
    d = take_half(blocks, 0)
    return join([d * to_float(q - 16) for q in _quants(blocks, 2)])


def _decode_q5_1(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 24)
    d, m = take_half(blocks, 0), take_half(blocks, 2)
    return join([d * to_float(q) + m for q in _quants(blocks, 4)])


Q5_0 = BlockFormat("Q5_0", 6, 32, 22, _decode_q5_0)
Q5_1 = BlockFormat("Q5_1", 7, 32, 24, _decode_q5_1)
