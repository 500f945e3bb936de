"""One generation as the scheduler sees it: its tokens, what it holds, and how much was sent to the device."""

from __future__ import annotations

from typing import Any, NamedTuple

from ferrum_jax.engine.ledger import Held
from ferrum_jax.structured.grammar import Follower


class Sequence:
    """A prompt and its output so far.

    tokens: prompt and known output. limit: of its tokens. number: order of arrival. cacheable: whether it may use cached pages.
    origin: the sequence that this one is a branch of. adapter: its index among the model's, -1 for none. owner: the request
    that it belongs to. cached: the tokens of the prompt that were there when it was first admitted, -1 before. follower: where
    its output is in its grammar, if it has one: after the known tokens and those that it forces in a dispatch in flight.

    While it runs it has a `slot`, and `held` is what it holds of the state. `target`: tokens known when it was admitted;
    `prefilled`: how many of these were sent to the device. `pending`: the largest number of tokens that were requested from the
    device and are not known yet; `due` of them arrive unless the sequence ends. `epoch` changes when results in flight become
    useless.
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
        follower: Follower | None = None,
    ):
        self.number, self.tokens, self.prompt_length, self.limit = number, tokens, prompt_length, limit
        self.origin, self.cacheable, self.adapter, self.owner = origin, cacheable, adapter, owner
        self.follower = follower
        self.state = "waiting"
        self.slot = self.cached = -1
        self.held = Held()
        self.target = self.prefilled = self.pending = self.due = self.epoch = 0

    @property
    def decoding(self) -> bool:
        """Whether all of its known tokens were sent to the device, the last one to be continued."""
        return self.state == "running" and self.prefilled == self.target

    @property
    def written(self) -> int:
        """Tokens in the state after the dispatches so far; all of them are known."""
        return len(self.tokens) - 1 if self.decoding else self.prefilled


class Extras(NamedTuple):
    """Parts of a request that are not in the sampler's parameters: ids with biases, and banned words."""

    bias: list[tuple[int, float]]
    banned: list[list[int]]


class Row(NamedTuple):
    """A sequence's part in a dispatch: `length` known tokens from `start` on; start -1: its newest ones, from the device.
    `samples`: whether the next token is chosen. `slot`, `held`: where it runs and what it holds, even if that changes before
    the launch. `keeps`: after which of its tokens the state of layers that recur is kept as well, and the place. `forced`: the
    last ones of its tokens, which its grammar has appended: a part of the results."""

    sequence: Sequence
    epoch: int
    start: int
    length: int
    samples: bool
    slot: int
    held: Held
    keeps: tuple[int, int] = (-1, -1)
    forced: tuple[int, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the results still matter."""
        return self.epoch == self.sequence.epoch and self.sequence.state == "running"


class Dispatch(NamedTuple):
    """The next work of the device: fill the slots of `admitted` (sequence, slot), make `copies` in the state (part, source,
    target), then one step over `rows`, or `steps` decode steps if that is not 0. `width`: the largest number of tokens per row
    and step. `waits`: it goes on from tokens in flight that a grammar has to know first."""

    rows: list[Row]
    steps: int
    admitted: list[tuple[Sequence, int]]
    copies: list[tuple[int, int, int]]
    width: int = 1
    waits: bool = False

    @property
    def tokens(self) -> int:
        """The tokens of a step with prompts; 0 for decode steps."""
        return 0 if self.steps else sum(row.length for row in self.rows)

    def least(self, row: Row) -> int:
        """The number of tokens that a sampling row generates unless it ends."""
        return max(self.steps, 1) if row.sequence.follower is None else 1 + len(row.forced)

    def most(self, row: Row) -> int:
        """The largest number of tokens that a sampling row can generate."""
        return self.least(row) * (self.width if row.sequence.follower is None else 1)
