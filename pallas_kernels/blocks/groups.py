"""Groups of integer weights with one scale and one zero point, as in GPTQ, AWQ and compressed-tensors checkpoints.

    U4_<size>_<scale>   scale | 1 byte z  | size / 2 bytes      w = scale * (q - z)        8 to 24 + 5 bits
    U8_<size>_<scale>   scale | 2 bytes z | size bytes          w = scale * (q - z)        8 to 24 + 9 bits

`size` weights share a scale of type F16, BF16 or F32; q is unsigned, z from 0 to 2^bits. With 4 bits each run of 32 weights has
16 bytes as in Q4_0: byte j holds its weight j in the low and its weight j + 16 in the high half. An F16 or BF16 scale gives
exact products; an F32 one rounds once. These are not ggml types and do not have a type id; checkpoints are repacked into them
while they are read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .format import BlockFormat, half_to_float32, join, split, take, take_words, to_float
from .plain import bfloat16_to_float32

BITS = (4, 8)
SIZES = (32, 64, 128)
_SCALES = {
    "F16": (2, lambda bits: half_to_float32(bits.astype(jnp.uint16))),
    "BF16": (2, lambda bits: bfloat16_to_float32(bits.astype(jnp.uint16))),
    "F32": (4, lambda bits: lax.bitcast_convert_type(bits, jnp.float32)),
}


def _decode(stored: jax.Array, bits: int, size: int, scale: str) -> jax.Array:
    width, to_number = _SCALES[scale]
    zero_bytes = bits // 4
    blocks = split(stored, width + zero_bytes + size * bits // 8)
    d = to_number(take_words(blocks, 0, 1, width))
    z = take_words(blocks, width, 1, zero_bytes).astype(jnp.int32)
    start = width + zero_bytes
    if bits == 8:
        return join([d * to_float(take(blocks, start, size) - z)])
    runs = [take(blocks, start + run, 16) for run in range(0, size // 2, 16)]
    return join([d * to_float(part - z) for q in runs for part in (q & 15, q >> 4)])


def _format(bits: int, size: int, scale: str) -> BlockFormat:
    decode = functools.partial(_decode, bits=bits, size=size, scale=scale)
    return BlockFormat(f"U{bits}_{size}_{scale}", -1, size, _SCALES[scale][0] + bits // 4 + size * bits // 8, decode)


GROUPS = {made.name: made for made in (_format(bits, size, scale) for bits in BITS for size in SIZES for scale in _SCALES)}
