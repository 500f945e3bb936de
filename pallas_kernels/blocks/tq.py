"""TQ1_0 and TQ2_0: 256 ternary weights, -1, 0 or 1, under one scale.

    TQ1_0   48 bytes t | 4 bytes u | half d        five (u: four) weights per byte, base 3
    TQ2_0   64 bytes q | half d                    four weights per byte, laid out as in Q2_K, w = d * (q - 1)

A byte of TQ1_0 is a fraction of 256 whose base-3 digits are the weights plus one: digit i is the integer part of
3 * (byte * 3^i mod 256) / 256. Bytes 0..31 give weights 32 i + j, bytes 32..47 weights 160 + 16 i + j, and u the last
16, 240 + 4 i + j. Width: 11 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .format import BlockFormat, flatten, join, split, take, take_half, to_float


def _digits(packed: jax.Array, count: int) -> jax.Array:
    """The first `count` base-3 digits of every byte, int32: [..., n] -> [..., count * n], digit by digit."""
    powers = np.power(3, np.arange(count, dtype=np.int32), dtype=np.int32)[:, None]
    return flatten((((packed[..., None, :] * powers) & 255) * 3) >> 8, 2)


def _decode_tq1_0(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 54)
    parts = [_digits(take(blocks, 0, 32), 5), _digits(take(blocks, 32, 16), 5), _digits(take(blocks, 48, 4), 4)]
    q = jnp.concatenate(parts, axis=-1)
    return join([take_half(blocks, 52) * to_float(q - 1)])


def _decode_tq2_0(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 66)
    d = take_half(blocks, 64)
    runs = [take(blocks, 32 * half, 32) >> (2 * k) for half in range(2) for k in range(4)]
    return join([d * to_float((q & 3) - 1) for q in runs])


TQ1_0 = BlockFormat("TQ1_0", 34, 256, 54, _decode_tq1_0)
TQ2_0 = BlockFormat("TQ2_0", 35, 256, 66, _decode_tq2_0)
