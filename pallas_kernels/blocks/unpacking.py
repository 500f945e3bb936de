"""Blocks from the planes of a memory layout, for weights that were stored for one kind of device and are loaded on another.

A memory layout moves bits and does not combine them, so its inverse need not be written for each format: rows in which every
bit spells its own number are packed, and the planes then show where each bit went and whether it is inverted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from . import format_of
from .layouts import LAYOUTS
from .quantize import on_host

_TILE_BITS = 1 << 26  # unpacked at a time, one byte each


def unpack_blocks(planes: Sequence[np.ndarray], format: str, memory_layout: str, rows: int, columns: int) -> np.ndarray:
    """The blocks uint8 [rows, bytes] of one matrix, from its planes as `LAYOUTS[memory_layout].pack` made them."""
    if memory_layout == "ggml":
        return np.ascontiguousarray(planes[0]).view(np.uint8).reshape(rows, -1)
    places, inverted = _places(format, memory_layout, columns)
    packed = _by_row(planes, memory_layout)
    out = np.empty((rows, format_of(format).row_bytes(columns)), np.uint8)
    step = max(1, _TILE_BITS // places.size)
    for start in range(0, rows, step):
        bits = np.unpackbits(packed[start : min(start + step, rows)], axis=1, bitorder="little")
        out[start : start + step] = np.packbits(bits[:, places] ^ inverted, axis=1, bitorder="little")
    return out


@functools.lru_cache(maxsize=64)
def _places(format: str, memory_layout: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """For every bit of a row of blocks, its place among the bits of the planes and whether it is inverted there."""
    count = 8 * format_of(format).row_bytes(columns)
    number = np.arange(count)
    digits = (((number + 1) >> np.arange(count.bit_length() + 1)[:, None]) & 1).astype(np.uint8)
    # The bits of a nibble are spelled one after the other, the fourth together with a 1: no layout keeps a lone fourth bit of
    # MXFP4, which is the negative zero.
    bases = [(number % 4 == 0) & (bit == 3) for bit in range(4)]
    probes = np.stack([row for bit, base in enumerate(bases) for row in (base, *(base ^ (digits * (number % 4 == bit))))])
    stored = np.packbits(probes.astype(np.uint8), axis=1, bitorder="little")
    with on_host():
        planes = [np.asarray(plane) for plane in LAYOUTS[memory_layout].pack(jnp.asarray(stored), format)]
    bits = np.unpackbits(_by_row(planes, memory_layout)[: len(probes)], axis=1, bitorder="little").reshape(
        4, len(digits) + 1, -1
    )
    spelled = (bits[:, 1:] ^ bits[:, :1]).astype(np.int64) << np.arange(len(digits))[:, None]
    origin = spelled.sum((0, 1)) - 1  # of every bit of the planes; -1: filling
    places = np.full(count, -1)
    places[origin[origin >= 0]] = np.flatnonzero(origin >= 0)
    if (places < 0).any():
        raise ValueError(f"memory layout {memory_layout} does not keep all bits of {format}")
    return places, bits[0, 0, places] ^ probes[0].astype(np.uint8)


def _by_row(planes: Sequence[np.ndarray], memory_layout: str) -> np.ndarray:
    """The planes next to each other as bytes, [rows, any]."""
    rows = [np.ascontiguousarray(plane if memory_layout == "gpu" else plane.T).view(np.uint8) for plane in planes]
    return np.concatenate(rows, 1)
