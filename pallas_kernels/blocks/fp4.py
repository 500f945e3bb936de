"""MXFP4 and NVFP4: 4-bit floating-point weights (E2M1) under 8-bit floating-point scales.

    MXFP4   byte e | 16 bytes q               32 weights, w = 2^(e - 128) * value[q]; laid out as in Q4_0
    NVFP4   4 bytes s | 32 bytes q            4 groups of 16, w = ue4m3(s) / 2 * value[q]

`value` is twice the E2M1 number, so that it is an integer: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives; its zero is unsigned. A
group of NVFP4 has weights 0..7 in the low and 8..15 in the high four bits of its 8 bytes. Its scales are unsigned E4M3 (bias
7), the sign bit ignored; 0x7F is NaN in that format and counts as zero here, as in ggml. Source: OCP Microscaling Formats (MX)
1.0. Widths: 1 + 2 and 4 + 2 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .format import BlockFormat, join, split, take, to_float


def value_of(q: jax.Array) -> jax.Array:
    """Twice the E2M1 number with bits q (0..15), int32: magnitudes are the nibbles of one constant."""
    magnitude = ((jnp.uint32(0xC8643210) >> (4 * (q & 7)).astype(jnp.uint32)) & 15).astype(jnp.int32)
    return jnp.where(q > 7, -magnitude, magnitude)


def times_power(value: jax.Array, exponent: jax.Array) -> jax.Array:
    """value * 2^(exponent - 128), exponent in 0..255, even if the scale or the result is below the normal float32 range.

    Backends flush subnormal operands and results of float arithmetic to zero, so exponents 0 and 1 are computed with integers:
    the bits of the result are its exponent field added to the bits of `value`, or, if subnormal, a multiple of 2^-149.
    """
    scale = lax.bitcast_convert_type(jnp.maximum(exponent - 1, 1) << 23, jnp.float32)
    normal = scale * to_float(value)
    magnitude = jnp.abs(value)
    shifted = lax.bitcast_convert_type(to_float(magnitude), jnp.int32) + ((exponent - 128) << 23)
    tiny = jnp.where(magnitude < 4, magnitude << (exponent + 21), shifted)
    signed = lax.bitcast_convert_type(jnp.where(value < 0, tiny | np.int32(-(2**31)), tiny), jnp.float32)
    return jnp.where(exponent < 2, signed, normal)


def _decode_mxfp4(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 17)
    exponent, q = take(blocks, 0), take(blocks, 1, 16)
    return join([times_power(value_of(q & 15), exponent), times_power(value_of(q >> 4), exponent)])


def _half_ue4m3(bits: jax.Array) -> jax.Array:
    """Half of the unsigned E4M3 number with these bits (0..255), float32."""
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = lax.bitcast_convert_type(((exponent + 119) << 23) | (mantissa << 20), jnp.float32)
    value = jnp.where(exponent == 0, to_float(mantissa) * np.float32(2.0**-10), normal)
    return jnp.where(bits == 0x7F, np.float32(0), value)


def _decode_nvfp4(stored: jax.Array) -> jax.Array:
    blocks = split(stored, 36)
    scale = _half_ue4m3(take(blocks, 0, 4))[..., None]
    q = take(blocks, 4, 32).reshape(*scale.shape[:-1], 8)
    return join([scale * to_float(value_of(q & 15)), scale * to_float(value_of(q >> 4))], axes=3)


MXFP4 = BlockFormat("MXFP4", 39, 32, 17, _decode_mxfp4)
NVFP4 = BlockFormat("NVFP4", 40, 64, 36, _decode_nvfp4)
