"""Layers cut into runs that repeat, so that compile time goes with distinct layer bodies and not with depth.

A Q4_K_M file of 48 layers, whose bodies by format are B B B B B B (A A B) x 12 B B B B B B, becomes three segments with
1 + 3 + 1 bodies: each segment is one scan over its repeats.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Layers start .. start + period * repeats - 1; layer start + i + j * period has the body of layer start + i."""

    start: int
    period: int
    repeats: int


def segments(signatures: Sequence[Hashable], longest_period: int = 8) -> tuple[Segment, ...]:
    """The cut with the fewest bodies, then the fewest segments."""
    count = len(signatures)
    best: list[tuple[tuple[int, int], tuple[Segment, ...]]] = [((0, 0), ())]
    for end in range(1, count + 1):
        choices = []
        for period in range(1, min(longest_period, end) + 1):
            start = end - period
            while start >= 0 and signatures[start : start + period] == signatures[end - period : end]:
                (bodies, pieces), before = best[start]
                segment = Segment(start, period, (end - start) // period)
                choices.append(((bodies + period, pieces + 1), (*before, segment)))
                start -= period
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[count][1]
