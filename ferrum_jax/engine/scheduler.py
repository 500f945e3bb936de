"""Which sequences take part in the next dispatch, and which pages they write to: pure host logic without device arrays.

Decodes come first, oldest sequence first, then prompts in order of arrival, cut to the rest of the token budget, or to a part
that does not hold up those that decode (pace.py). Pages are taken as sequences grow. When none is left, the youngest sequence
is preempted: it gives everything back, waits in its old position and is computed again, from its cached pages if they are still
there. So the oldest sequence always makes progress, and every sequence becomes the oldest at some time: none starves.

The device may lag behind: work that was sent to it counts as done here (`prefilled`, `pending`). Because the device runs
dispatches in order, a page can be given to another sequence while an earlier dispatch still uses it.

A sequence with a grammar decodes one token in a dispatch, and only from a token that the host knows. Such a dispatch waits for
the results of the one before, or the sequence is left out of it (`turns`). Tokens that can only be what they are, by a grammar,
are appended when that is known, just before the launch: the dispatch reads them like a prompt and chooses the one after them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.ledger import Found, Held, Ledger
from ferrum_jax.engine.pace import Pace
from ferrum_jax.engine.sequence import Dispatch, Row, Sequence

_BURST = 2  # sequences that wait for their first token, for each that decodes, before those that decode must wait


class Scheduler:
    """`ledger`: which sequence holds which part of the state. `pace`: how long steps take.

    Counts: `preemptions`, `lookups` (of prefixes), `hit_pages`, `saved_tokens` (prompt tokens not computed).
    """

    def __init__(self, config: EngineConfig, ledger: Ledger):
        self.config, self.ledger, self.pace = config, ledger, Pace(config)
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.forget_counts()
        self.current: Sequence | None = None  # the one that `next` is handling, to blame for an error
        self._slots = list(range(config.max_seqs - 1, -1, -1))

    def forget_counts(self) -> None:
        """Sets all counts to 0."""
        self.preemptions = self.lookups = self.hit_pages = self.saved_tokens = 0
        for pool in filter(None, (*self.ledger.pools, self.ledger.checkpoints)):
            pool.evictions = 0

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue, by order of arrival."""
        sequence.state = "waiting"
        bisect.insort(self.waiting, sequence, key=_number)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence in any state. What it holds is given back once, however often this is called."""
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        elif sequence.state == "running":
            self._give_up(sequence)
        sequence.state = "finished"

    def preempt(self, sequence: Sequence) -> None:
        """Takes away a running sequence's pages and slot and lets it wait."""
        self._give_up(sequence)
        self.preemptions += 1
        self.add(sequence)

    def start_over(self) -> None:
        """All running sequences wait again, and every page and slot becomes free."""
        for sequence in self.running:
            _let_go(sequence)
            self.preemptions += 1
            self.add(sequence)
        self.running.clear()
        self.ledger.clear()
        self._slots = list(range(self.config.max_seqs - 1, -1, -1))

    def next(self, steps: int, turns: int = 0) -> Dispatch | None:
        """The next dispatch, or None if there is nothing to do until results arrive. `steps`: decode steps in a dispatch while
        no sequence waits or reads a prompt. `turns`: steps of the other sequences while those with a grammar have tokens in
        flight; 0: all decode together, and the dispatch waits for these tokens."""
        before, self.current = self.preemptions, None
        copies: list[tuple[int, int, int]] = []
        admitted: list[tuple[Sequence, int]] = []
        width = 1 + self.config.speculation
        away = self._away(turns)
        if any(sequence.follower is not None and sequence.decoding and sequence not in away for sequence in self.running):
            steps = 1
        elif away:
            steps = min(steps, turns)
        at_once = steps
        if self.waiting or any(sequence.prefilled != sequence.target for sequence in self.running):
            steps = 1
        elif steps > 1:
            growing = [sequence for sequence in self.running if _growing(sequence) and sequence not in away]
            steps = min(steps, max((s.limit - len(s.tokens) - s.due for s in growing), default=0))
            missing = sum(self._missing(sequence, _decoded(sequence, steps * width)) for sequence in growing)
            if missing > self.ledger.available:
                steps = 1
        rows = [
            Row(sequence, sequence.epoch, -1, 1, True, sequence.slot, sequence.held)
            for sequence in self._running()
            if sequence.prefilled == sequence.target
            and _growing(sequence)
            and sequence not in away
            and self._grow(sequence, _decoded(sequence, steps * width))
        ]
        waits = any(row.sequence.follower is not None and row.sequence.pending for row in rows)
        prompts = list(self._prompts(max(1, self._most(len(rows), at_once) - len(rows)), admitted, copies, before))
        mixed = bool(prompts)
        rows += prompts
        if self.preemptions > before:
            rows = [row for row in rows if row.valid]
            mixed = any(row.start >= 0 for row in rows)
        if not rows:
            return None
        dispatch = Dispatch(rows, 0 if mixed else steps, admitted, copies, 1 if mixed else width, waits)
        for row in rows:
            if row.samples:
                row.sequence.pending += dispatch.most(row)
                row.sequence.due += dispatch.least(row)
            if row.start >= 0:
                self.current = row.sequence
                row.sequence.prefilled += row.length
                self._settle(row.sequence)
        return dispatch

    def force(self, dispatch: Dispatch, forced: dict[int, list[int]], ready: Callable[[Dispatch], bool]) -> Dispatch:
        """A dispatch that also reads tokens that grammars force, by the index of their rows, as far as there are pages for
        them. The dispatch as it is if that one is not `ready`, or if it uses pages that were given back since it was chosen:
        by a row that has ended, or by a prompt that will not look at them again."""
        rows = list(dispatch.rows)
        if not all(row.valid and (row.start < 0 or not self.ledger.windowed) for row in rows):
            return dispatch
        longer = {i: _longer(rows[i], tokens) for i, tokens in forced.items()}
        if not ready(dispatch._replace(rows=[longer.get(i, row) for i, row in enumerate(rows)], steps=0)):
            return dispatch
        for i, row in longer.items():
            sequence, follower = row.sequence, row.sequence.follower
            assert follower is not None
            end = follower.end + len(row.forced)
            if self._missing(sequence, end) <= self.ledger.available and self.ledger.grow(row.held, end):
                rows[i] = row
                follower.go_on(row.forced)
                sequence.pending += len(row.forced)
                sequence.due += len(row.forced)
        return dispatch._replace(rows=rows, steps=0) if any(row.forced for row in rows) else dispatch

    def received(self, row: Row, tokens: list[int], dispatch: Dispatch) -> None:
        """Records the result of a row of a dispatch: its tokens are known now."""
        if row.samples:
            row.sequence.pending -= dispatch.most(row)
            row.sequence.due -= dispatch.least(row)
        row.sequence.tokens.extend(tokens)
        self._settle(row.sequence)

    def keep(self, sequence: Sequence) -> list[tuple[int, int, int]]:
        """The copies that keep the state of a sequence whose text has ended, for texts that go on from there: to be made before
        another sequence has its slot. The device must not be ahead of the known tokens."""
        return self.ledger.end(sequence.held, sequence.tokens, sequence.written, sequence.adapter, sequence.slot)

    # Inside

    def _running(self) -> Iterator[Sequence]:
        """Running sequences, oldest first, while some of them may be preempted."""
        for sequence in list(self.running):
            if sequence.state == "running":
                self.current = sequence
                yield sequence

    def _most(self, decoding: int, steps: int) -> int:
        """Limit of the tokens in a step: the whole budget while far more sequences wait for their first token than decode;
        later those that decode must not wait long."""
        reading = sum(sequence.prefilled != sequence.target for sequence in self.running)
        first = reading + min(len(self.waiting), len(self._slots))
        steps = 1 if len(self.waiting) > len(self._slots) else steps  # then no dispatch has more
        return self.pace.most(decoding, steps) if 0 < first <= _BURST * decoding else self.config.token_budget

    def _away(self, turns: int) -> list[Sequence]:
        """The sequences that are left out of the next dispatch: those whose grammar has to know their tokens in flight, if
        others can decode meanwhile."""
        flying = [sequence for sequence in self.running if sequence.follower is not None and sequence.pending]
        others = flying and any(sequence.follower is None and sequence.decoding for sequence in self.running)
        return flying if turns and others else []

    def _prompts(self, budget: int, admitted: list[tuple[Sequence, int]], copies: list, preemptions: int) -> Iterator[Row]:
        """Rows with prompt tokens: of running sequences, then of those that are admitted."""
        for sequence in self._running():
            if budget and sequence.prefilled != sequence.target:
                count = self._next(sequence, budget)
                if self._grow(sequence, sequence.prefilled + count):
                    copies += self.ledger.checkpoint(sequence.held, sequence.prefilled, sequence.slot)
                    budget -= count
                    yield self._prompt_row(sequence, count)
        for sequence in list(self.waiting):
            if not budget or not self._slots or self.preemptions > preemptions:
                return
            self.current, origin = sequence, sequence.origin
            if origin is not None and origin.state != "finished" and not origin.decoding:
                continue  # the prompt is computed by the origin first
            if not self._admit(sequence, copies):
                if not self.running:  # it would wait forever, and so would all after it
                    pages = " and ".join(str(pool.num_pages) for pool in self.ledger.pools)
                    raise RuntimeError(f"{len(sequence.tokens)} tokens do not fit into {pages} pages")
                return
            admitted.append((sequence, sequence.slot))
            count = self._next(sequence, budget)
            self._grow(sequence, sequence.prefilled + count)
            budget -= count
            yield self._prompt_row(sequence, count)

    def _prompt_row(self, sequence: Sequence, count: int) -> Row:
        start, held = sequence.prefilled, sequence.held
        keeps = self.ledger.passed(held, start, count)
        return Row(sequence, sequence.epoch, start, count, start + count == sequence.target, sequence.slot, held, keeps)

    def _next(self, sequence: Sequence, budget: int) -> int:
        """The number of tokens of its prompt that a sequence reads next."""
        count = min(budget, sequence.target - sequence.prefilled)
        return self.ledger.at_most(sequence.held, sequence.prefilled, count)

    def _admit(self, sequence: Sequence, copies: list[tuple[int, int, int]]) -> bool:
        """Gives a waiting sequence a slot and the part of its state that exists already, if there is room for the rest."""
        found = self._found(sequence)
        admitted = self.ledger.admit(found, len(sequence.tokens), self._slots[-1], bool(self.running))
        if admitted is None:
            return False
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_number)
        sequence.held, needed = admitted
        copies += needed
        sequence.state, sequence.slot, sequence.origin = "running", self._slots.pop(), None
        sequence.pending = sequence.due = 0
        sequence.target = len(sequence.tokens)
        sequence.prefilled = found.full * self.ledger.page_size + found.more
        sequence.cached = sequence.prefilled if sequence.cached < 0 else sequence.cached
        self.lookups += sequence.cacheable and self.config.prefix_cache
        self.hit_pages += found.full
        self.saved_tokens += sequence.prefilled
        return True

    def _found(self, sequence: Sequence) -> Found:
        """The existing beginning of a sequence. Its last token is always computed again."""
        origin, last = sequence.origin, len(sequence.tokens) - 1
        if not sequence.cacheable:
            return self.ledger.nothing()
        if origin is not None and origin.decoding and origin.written >= last:
            found = self.ledger.branch(origin.held, last)
            if found is not None:
                return found
        return self.ledger.find(sequence.tokens, sequence.adapter) if self.config.prefix_cache else self.ledger.nothing()

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Gives a running sequence room for `tokens` tokens, preempting the youngest sequences if necessary. False if that
        reaches the sequence itself; with tokens in flight it is not preempted but waits for them, because it may end with
        them."""
        while not self.ledger.grow(sequence.held, tokens):
            victim = self.running[-1]
            if victim is sequence and sequence.pending:
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        return max(0, self.ledger.count(tokens) - sequence.held.count)

    def _settle(self, sequence: Sequence) -> None:
        held = sequence.held
        if len(sequence.tokens) >= held.settles_at:
            self.ledger.settle(held, sequence.tokens, sequence.written, sequence.adapter)

    def _give_up(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.ledger.give_back(sequence.held)
        self._slots.append(sequence.slot)
        _let_go(sequence)


def _longer(row: Row, forced: list[int]) -> Row:
    return row._replace(length=row.length + len(forced), forced=tuple(forced))


def _let_go(sequence: Sequence) -> None:
    """Resets a sequence that has stopped running."""
    sequence.slot, sequence.held = -1, Held()
    sequence.target = sequence.prefilled = sequence.pending = sequence.due = 0
    sequence.epoch += 1


def _number(sequence: Sequence) -> int:
    return sequence.number


def _growing(sequence: Sequence) -> bool:
    """Whether more tokens can be requested, even if all guesses in flight are wrong."""
    return len(sequence.tokens) + sequence.due < sequence.limit


def _decoded(sequence: Sequence, tokens: int) -> int:
    """The largest number of tokens of a decoding sequence in pages after `tokens` more are generated."""
    return min(len(sequence.tokens) - 1 + sequence.pending + tokens, sequence.limit - 1)
