"""How many tokens of prompts a step may read while other sequences decode.

All rows of a step end together, so those that decode wait for the chunk of a prompt that is in their step. A step takes about a
decode step's time and a constant time for each token of its shape. Both are measured on the engine's own dispatches; from them
follows the largest shape that takes no longer than a few decode steps. Results do not depend on how a prompt is cut.
"""

from __future__ import annotations

from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.sequence import Dispatch

_LONGEST = 3.5  # decode steps that a step with prompt tokens may take
_LEAST = 64  # tokens of a step, because a smaller one takes much longer for each
_FORGET = 1.02  # what disturbs a measurement makes it longer, so the shortest counts, and is forgotten slowly


class Pace:
    """The times of an engine's steps: `took` learns them, `most` uses them."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._steps: dict[int, float] = {}  # seconds of a decode step, by the rows of its shape
        self._token = 0.0  # seconds of a token in a step with prompts, in addition to those of a decode step

    def took(self, dispatch: Dispatch, seconds: float) -> None:
        """Learns from a dispatch."""
        bucket = self._config.bucket(dispatch.tokens, len(dispatch.rows))
        if dispatch.steps:
            self._steps[bucket.rows] = _shorter(self._steps.get(bucket.rows, 0.0), seconds / dispatch.steps)
        elif self._steps:
            self._token = _shorter(self._token, max(seconds - min(self._steps.values()), 0.0) / bucket.tokens)

    def most(self, decoding: int) -> int:
        """Limit of the tokens in a step in which this many rows, fewer than there are slots, decode: the budget, or less if
        that would take too long."""
        budget = self._config.token_budget
        known = [rows for rows in self._steps if rows <= self._config.bucket(0, decoding).rows]
        if not known or not self._token:
            return budget
        seconds = _LONGEST * self._steps[max(known)] - min(self._steps.values())
        sizes = [bucket.tokens for bucket in self._config.buckets if bucket.tokens > decoding and bucket.tokens >= _LEAST]
        fitting = [size for size in sizes if size * self._token <= seconds]
        return min(budget, max(fitting or sizes[:1], default=budget))


def _shorter(known: float, seconds: float) -> float:
    return min(seconds, known * _FORGET) if known else seconds
