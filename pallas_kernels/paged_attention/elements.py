"""8-bit elements of a KV cache as operands of 16-bit products on a GPU, both halves of 16-bit words.

Only bit operations, on two words at a time in a register: a conversion to float and back would take longer than the memory
does. Each has two forms, PTX and the same in jnp for interpret mode. All are exact for all 256 patterns:

* int8 to float16: 1024 + 128 + b is the pattern 0x6480 ^ b; subtract 1152.
* int8 to bfloat16: 128 + (b & 127) is 0x4300 | (b & 127), and 0x4300 | (b & 128) is 128 or 256; subtract.
* e4m3 to float16: the exponent moves in place, which makes the value / 2^8; the one pattern with all of exponent and
  mantissa set is NaN: adding one to its last place carries into the bit that completes float16's exponent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

E4M3_UNIT = 2.0**8  # the factor that the float16 forms of e4m3 numbers lack

# w: two words; lop3's tables: 0x6A (a & b) ^ c, 0xEA (a & b) | c.
_INT8 = {
    "float16": "mov.b32 u, 0x64806480; lop3.b32 t, w, 0x00FF00FF, u, 0x6A; sub.rn.f16x2 $0, t, u;",
    "bfloat16": "lop3.b32 t, w, 0x007F007F, 0x43004300, 0xEA; lop3.b32 u, w, 0x00800080, 0xC300C300, 0xEA; "
    "mov.b32 w, 0x3F803F80; fma.rn.bf16x2 $0, u, w, t;",
}
_E4M3 = (
    "and.b32 t, t, 0x3F803F80; lop3.b32 u, u, 0x80008000, t, 0xEA; add.u32 t, t, 0x00800080; "
    "lop3.b32 $0, t, 0x40004000, u, 0xEA;"
)
_E4M3_HALVES = ("shl.b32 u, w, 8; shl.b32 t, w, 7; ", "mov.b32 u, w; shr.u32 t, w, 1; ")


def from_int8(words: jax.Array, dtype: str, interpret: bool) -> list[jax.Array]:
    """The integers in the low and the high bytes of uint16 words, in float16 or bfloat16."""
    if not interpret:
        return [_ptx(shift + _INT8[dtype], words, dtype) for shift in ("", "shr.u32 w, w, 8; ")]
    unsigned = (words & 0xFF, words >> 8)
    if dtype == "float16":
        return [_bits(b ^ 0x6480, dtype) - 1152 for b in unsigned]
    return [_bits((b & 0x7F) | 0x4300, dtype) - _bits((b & 0x80) | 0x4300, dtype) for b in unsigned]


def from_e4m3(words: jax.Array, interpret: bool) -> list[jax.Array]:
    """The numbers in the low and the high bytes of uint16 words, divided by E4M3_UNIT, in float16."""
    if not interpret:
        return [_ptx(half + _E4M3, words, "float16") for half in _E4M3_HALVES]
    halves = []
    for sign, rest in ((words << 8, words << 7), (words, words >> 1)):
        rest = rest & 0x3F80
        halves.append(_bits((sign & 0x8000) | rest | ((rest + 0x80) & 0x4000), "float16"))
    return halves


def _ptx(body: str, words: jax.Array, dtype: str) -> jax.Array:
    return compat.triton_asm(
        "{ .reg .b32 w, t, u; mov.b32 w, $1; " + body + " }",
        args=[words],
        constraints="=r,r",
        pack=2,
        result=jax.ShapeDtypeStruct(words.shape, jnp.dtype(dtype)),
    )


def _bits(bits: jax.Array, dtype: str) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.dtype(dtype))
