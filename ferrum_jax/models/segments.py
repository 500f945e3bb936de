"""Splits layers into runs that repeat, so that compile time grows with the number of distinct layer bodies and not with depth.

A Q4_K_M file of 48 layers, whose bodies by format are B B B B B B (A A B) x 12 B B B B B B, becomes three segments with 1 + 2 +
1 bodies: each segment is one scan over its repeats, and equal neighboring layers in a period are a scan inside it. So a
repeated pattern of five layers with a window and one without has two bodies.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Layers from `start` on: `repeats` times a list of bodies, each for as many layers as `runs` says."""

    start: int
    runs: tuple[int, ...]
    repeats: int

    @property
    def period(self) -> int:
        return sum(self.runs)


def segments(signatures: Sequence[Hashable], longest_period: int = 12) -> tuple[Segment, ...]:
    """The split with the fewest bodies, then the fewest segments. signatures: one for each layer, equal if the body is."""
    count = len(signatures)
    best: list[tuple[tuple[int, int], tuple[Segment, ...]]] = [((0, 0), ())]
    for end in range(1, count + 1):
        choices = []
        for period in range(1, min(longest_period, end) + 1):
            start = end - period
            runs = tuple(len(list(run)) for _, run in itertools.groupby(signatures[start:end]))
            while start >= 0 and signatures[start : start + period] == signatures[end - period : end]:
                (bodies, pieces), before = best[start]
                segment = Segment(start, runs, (end - start) // period)
                choices.append(((bodies + len(runs), pieces + 1), (*before, segment)))
                start -= period
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[count][1]
