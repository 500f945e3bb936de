"""Rounds sizes up to a short list and pads rows, so that few shapes are compiled."""

from __future__ import annotations

import numpy as np


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ..., at most 1.5 times the size (from 16 on)."""
    power = 1 << max(4, (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 16 else power


def power_of_two(count: int) -> int:
    """The next power of two, to which the rows of a batch are padded."""
    return 1 << (count - 1).bit_length()


def by_fours(size: int, first: int) -> int:
    """The next of first, 4 first, 16 first, ..., so that a growing text needs few shapes."""
    while first < size:
        first *= 4
    return first


def padded(prompts: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, width], right-padded with 0, and lengths int32 [B]. B is a power of two; padding rows have length 0."""
    tokens = np.zeros((power_of_two(len(prompts)), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths
