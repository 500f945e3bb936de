"""`BlockFormat`, and the few byte operations that every decoder is made of.

A row of a compressed matrix is a run of blocks; a block holds `block_size` weights in `block_bytes` bytes: small integers and
the scales that turn them into weights. A decoder cuts a block into *pieces*: equally wide runs of consecutive weights whose
bytes and scales are static slices of the block. It computes each piece with plain elementwise arithmetic and stacks them
(`join`). XLA then emits one dense, vectorized loop for each piece; on CPU that is 4 to 6 times faster for K-quants than
shifting and reshaping the whole block at once.

Every decoder here is exact. A product of a half-precision scale (11 significant bits) with the integers of its format has at
most 24 significant bits and, if it is finite and not zero, lies between 2^-30 and 2^30, so it is a float32 without rounding, in
any order of multiplication. Formats with an offset add a second such product: one rounding, the same with or without a fused
multiply-add. Each file states its widths of bits; fp4.py, whose scales have a wider range, states what it does instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class BlockFormat:
    """One ggml tensor type: its layout in bytes and the function that unpacks it.

    Attributes:
      name: ggml's name, such as "Q4_K".
      type_id: ggml's number of the type, as GGUF files store it.
      block_size: weights per block.
      block_bytes: bytes per block.
      decode: stored array [..., stored_width(weights)] of dtype `storage` -> float32 [..., weights].
      storage: dtype of the array kept on the device: bytes, or one element per weight for the plain types.
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    decode: Callable[[jax.Array], jax.Array]
    storage: np.dtype = _BYTE

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of `weights` weights; ValueError if they do not fill whole blocks."""
        if weights % self.block_size:
            raise ValueError(f"{self.name}: a row of {weights} weights does not consist of whole blocks of {self.block_size}")
        return weights // self.block_size * self.block_bytes

    def stored_width(self, weights: int) -> int:
        """Elements of dtype `storage` in a row of `weights` weights; ValueError as for `row_bytes`."""
        return self.row_bytes(weights) // self.storage.itemsize


def split(stored: jax.Array, block_bytes: int) -> jax.Array:
    """uint8 [..., bytes] -> uint8 [..., blocks, block_bytes]."""
    return stored.reshape(*stored.shape[:-1], stored.shape[-1] // block_bytes, block_bytes)


def flatten(array: jax.Array, axes: int) -> jax.Array:
    """The last `axes` axes as one."""
    return array.reshape(*array.shape[:-axes], math.prod(array.shape[-axes:]))


def join(pieces: Sequence[jax.Array], axes: int = 2) -> jax.Array:
    """Pieces, in the order of their weights, stacked before their last axis and flattened -> [..., weights].

    A piece is [..., blocks, width], or with axes=3 [..., blocks, groups, width] if every group has all pieces.
    """
    return flatten(jnp.stack(pieces, axis=-2), axes + 1)


def spread(packed: jax.Array, count: int, bits: int) -> jax.Array:
    """The `count` lowest fields of `bits` bits of each integer: int32 [...] -> [..., count], lowest first."""
    return (packed[..., None] >> (bits * jnp.arange(count, dtype=jnp.int32))) & ((1 << bits) - 1)


def take(blocks: jax.Array, start: int, count: int = 1) -> jax.Array:
    """Bytes [start, start + count) of every block as int32 [..., blocks, count]."""
    return blocks[..., start : start + count].astype(jnp.int32)


def take_signed(blocks: jax.Array, start: int, count: int = 1) -> jax.Array:
    """Bytes [start, start + count) of every block, read as int8, as int32 [..., blocks, count]."""
    return lax.bitcast_convert_type(blocks[..., start : start + count], jnp.int8).astype(jnp.int32)


def take_words(blocks: jax.Array, start: int, count: int, width: int, stride: int | None = None) -> jax.Array:
    """`count` little-endian integers of `width` bytes, `stride` (default `width`) apart, as uint32 [..., count]."""
    stride = stride or width
    words = jnp.zeros((), jnp.uint32)
    for byte in range(width):
        first = start + byte
        part = blocks[..., first : first + (count - 1) * stride + 1 : stride].astype(jnp.uint32)
        words = words | (part << (8 * byte))
    return words


def half_to_float32(bits: jax.Array) -> jax.Array:
    """IEEE half-precision bits to float32, exactly: signed zeros, subnormals, infinities and NaN included.

    bits: uint16, converted by the instruction that CPU and GPU have; or int32 / uint32 (upper half zero), decoded with
    32-bit integer operations alone, for kernels on TPU, where float16 cannot be loaded.
    """
    if bits.dtype == jnp.uint16:
        return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    rebias = jnp.where(magnitude >= 0x7C00, 224 << 23, 112 << 23)  # infinity and NaN go to exponent 255
    normal = (magnitude << 13) + rebias
    # A subnormal half is an integer times 2^-24; shifting its bits would make a float32 that backends flush to zero.
    subnormal = lax.bitcast_convert_type(magnitude.astype(jnp.float32) * np.float32(2.0**-24), jnp.int32)
    value = jnp.where(magnitude < 0x0400, subnormal, normal) | ((bits & 0x8000) << 16)
    return lax.bitcast_convert_type(value, jnp.float32)


def take_half(blocks: jax.Array, start: int) -> jax.Array:
    """The half-precision number at byte `start` of every block as float32 [..., blocks, 1]."""
    low = blocks[..., start : start + 1].astype(jnp.uint16)
    high = blocks[..., start + 1 : start + 2].astype(jnp.uint16)
    return half_to_float32(low | (high << 8))


def two_groups(first: jax.Array, second: jax.Array) -> jax.Array:
    """Scales [..., blocks, 1] of two neighboring groups of 16 weights -> [..., blocks, 32], one for each weight.

    A select on the lane vectorizes; jnp.repeat becomes an index computation for each weight.
    """
    return jnp.where(jnp.arange(32) < 16, first, second)


def to_float(integers: jax.Array) -> jax.Array:
    """Integers of at most 24 bits to float32, exactly."""
    return integers.astype(jnp.float32)
