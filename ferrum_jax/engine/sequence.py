"""One generation as the scheduler sees it: what it has, what it holds, and how far the device has been told to go."""

from __future__ import annotations

from typing import Any, NamedTuple

from ferrum_jax.engine.ledger import Held


class Sequence:
    """A prompt and what was made of it so far.

    tokens: prompt and known output. limit: tokens in all at most. number: order of arrival. cacheable: whether it may
    take cached pages. origin: a sequence that this one is a branch of. adapter: its index among the model's, -1 for none.
    owner: whoever watches it.

    While it runs it has a `slot`, and `held` is what it holds of the state. `target`: tokens known when it was admitted;
    `prefilled`: of these, sent to the device. `pending`: tokens at most that were asked of the device and are not known yet;
    `due` of them come unless the sequence ends. `epoch` changes when results on their way are of no more use.
    """

    def __init__(
        self,
        number: int,
        tokens: list[int],
        prompt_length: int,
        limit: int,
        *,
        origin: Sequence | None = None,
        cacheable: bool = True,
        adapter: int = -1,
        owner: Any = None,
    ):
        self.number, self.tokens, self.prompt_length, self.limit = number, tokens, prompt_length, limit
        self.origin, self.cacheable, self.adapter, self.owner = origin, cacheable, adapter, owner
        self.state = "waiting"
        self.slot = -1
        self.held = Held()
        self.target = self.prefilled = self.pending = self.due = self.epoch = 0

    @property
    def decoding(self) -> bool:
        """Whether all of its known tokens were sent to the device, the last one to be continued."""
        return self.state == "running" and self.prefilled == self.target

    @property
    def written(self) -> int:
        """Tokens that the state has taken in when the dispatches so far have run; all of them known."""
        return len(self.tokens) - 1 if self.decoding else self.prefilled


class Extras(NamedTuple):
    """What a request asks for beside `SamplingParams` that the sampler takes: ids with biases, and words that are banned."""

    bias: list[tuple[int, float]]
    banned: list[list[int]]


class Row(NamedTuple):
    """A sequence's part in a dispatch: `length` known tokens from `start` on; start -1: its newest token, from the device.
    `samples`: whether the next token is chosen. `slot`, `held`: where it runs and what it holds, whatever becomes of it
    before the launch."""

    sequence: Sequence
    epoch: int
    start: int
    length: int
    samples: bool
    slot: int
    held: Held

    @property
    def valid(self) -> bool:
        """Whether the results still matter."""
        return self.epoch == self.sequence.epoch and self.sequence.state == "running"


class Dispatch(NamedTuple):
    """What the device is to do next: fill the slots of `admitted` (sequence, slot), make `copies` in its state (part, source,
    target), then one step over `rows`, or where `steps` is not 0 so many decode steps. `width`: tokens that a row may make
    in a step."""

    rows: list[Row]
    steps: int
    admitted: list[tuple[Sequence, int]]
    copies: list[tuple[int, int, int]]
    width: int = 1

    @property
    def least(self) -> int:
        """Tokens that a row which samples makes unless it ends."""
        return max(self.steps, 1)

    @property
    def most(self) -> int:
        """Tokens that a row which samples may make."""
        return self.least * self.width
