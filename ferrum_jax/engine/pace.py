"""How many tokens of prompts a step may read while other sequences decode.

All rows of a step end together, so those that decode wait for the chunk of a prompt that is in their step. A step takes a
decode step's time, and a constant time for each token of its shape. Both are measured on the engine's own dispatches; from them
follows the largest shape that takes no longer than a few dispatches without prompts. Results do not depend on how a prompt is
cut.
"""

from __future__ import annotations

from ferrum_jax.engine.config import Bucket, EngineConfig
from ferrum_jax.engine.sequence import Dispatch

_LONGEST = 3.5  # dispatches without prompts, whose time a step with prompts may take
_LEAST = 64  # tokens of a step, because a smaller one takes much longer for each
_AGILITY = 1.1  # a time changes by no more than this with a measurement, which may have been disturbed


class Pace:
    """The times of an engine's steps: `took` learns them, `most` uses them."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._steps: dict[int, float] = {}  # seconds of a decode step, by its rows
        self._token = 0.0  # seconds of a token in a step with prompts, in addition to those of a decode step

    def took(self, dispatch: Dispatch, seconds: float, shape: Bucket | None = None) -> None:
        """Learns from a dispatch. `shape`: None if it was the smallest one."""
        if dispatch.steps:
            rows = len(dispatch.rows)
            self._steps[rows] = _follow(self._steps.get(rows, 0.0), seconds / dispatch.steps)
        elif self._steps:
            shape = shape or self._config.bucket(dispatch.tokens, len(dispatch.rows))
            decoding = sum(row.start < 0 for row in dispatch.rows)
            self._token = _follow(self._token, max(seconds - self._step(decoding), 0.0) / shape.tokens)

    def most(self, decoding: int, steps: int) -> int:
        """Limit of the tokens in a step in which this many rows, fewer than there are slots, decode: the budget, or less if
        that would take too long. `steps`: decode steps of a dispatch without prompts."""
        budget = self._config.token_budget
        if not self._steps or not self._token:
            return budget
        step = self._step(decoding)
        seconds = (_LONGEST * steps - 1) * step
        sizes = [bucket.tokens for bucket in self._config.buckets if bucket.tokens > decoding and bucket.tokens >= _LEAST]
        fitting = [size for size in sizes if size * self._token <= seconds]
        return min(budget, max(fitting or sizes[:1], default=budget))

    def gains(self, dispatch: Dispatch, tokens: int) -> bool:
        """Whether to read this many known tokens in a dispatch in addition, instead of making each of them with a step of all
        rows."""
        rows = len(dispatch.rows)
        if not self._steps or not self._token:
            return 2 * tokens >= rows
        wider = self._config.bucket((dispatch.tokens or rows) + tokens, rows).tokens
        wider -= self._config.bucket(dispatch.tokens, rows).tokens
        return tokens * self._step(rows) >= rows * wider * self._token

    def _step(self, rows: int) -> float:
        """Seconds of a decode step of this many rows: as measured, or of the next smaller number that was."""
        return self._steps[max((known for known in self._steps if known <= rows), default=min(self._steps))]


def _follow(known: float, seconds: float) -> float:
    return min(max(seconds, known / _AGILITY), known * _AGILITY) if known else seconds
