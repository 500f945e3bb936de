"""The few shapes that programs are compiled for: sizes are rounded up to a short list and rows are padded."""

from __future__ import annotations

import numpy as np


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ...: at most half as much again as asked for."""
    power = 1 << max(4, (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 16 else power


def power_of_two(count: int) -> int:
    """The next power of two: how many rows a batch is padded to."""
    return 1 << (count - 1).bit_length()


def by_fours(size: int, first: int) -> int:
    """The next of first, 4 first, 16 first, ...: a text that grows meets few of them."""
    while first < size:
        first *= 4
    return first


def padded(prompts: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, width], right-padded with 0, and lengths int32 [B]; B is a power of two, rows of padding have length 0."""
    tokens = np.zeros((power_of_two(len(prompts)), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths
