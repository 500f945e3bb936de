"""A device in NumPy whose KV pages hold tokens, positions and adapters instead of keys and values, so that every read can be
checked.

`use` puts it under a real `Engine`. The next token is a hash of text, seed and adapter, so the right output of a request is
known for any schedule (`expected`). Anything an engine must never do raises `Violation`, which `except Exception` does not
catch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ferrum_jax.completion import Completion
from ferrum_jax.config import Attention, Dense, LayerSpec, Rope
from ferrum_jax.engine import Engine, EngineConfig, engine, steps
from ferrum_jax.engine.sequence import Dispatch, Row, Sequence
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.state import DecodeState, KVCache, page_kinds, recurrent_kinds
from ferrum_jax.structured import Structured
from ferrum_jax.structured.grammar import Follower
from support.recurrent_toy import Toy

VOCAB, END = 6, 0  # ids 1 .. 5 are the letters a .. e
ADAPTERS = ("one", "other")
_COPIES = 8  # pages that the device copies at once: all are read before any is written


class Violation(BaseException):
    """The engine has broken a rule of the device."""


class Injected(RuntimeError):
    """A failure that a test requested."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def next_token(text: list[int], seed: int, adapter: int, mask: int = -1) -> int:
    """The next token of a text, among those in the mask of a grammar."""
    value = zlib.crc32(bytes(text), seed + (adapter + 1 << 8)) * 2654435761 % 2**32 >> 8
    token = END if value % 12 == 0 else 1 + value // 12 % (VOCAB - 1)
    return token if mask >> token & 1 else next(token for token in range(VOCAB) if mask >> token & 1)


def state_of(text: list[int], adapter: int) -> tuple[int, int, int]:
    """What layers that recur keep of a text."""
    return zlib.crc32(bytes(text)) & 0x7FFFFFFF, len(text), adapter


class Tokenizer:
    """Letters, and an end token without text."""

    eos_ids = frozenset({END})
    vocab_size = VOCAB
    adds_space_prefix = False

    def is_control(self, token: int) -> bool:
        return token == END

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == END else bytes([96 + token])


class Matcher:
    """The part of a grammar library that a `Follower` uses: some tokens are forced by their place in the text."""

    def __init__(self, place: int = 0, runs: int = 0):
        self.place, self.runs = place, runs

    def deep_copy(self) -> Matcher:
        return Matcher(self.place, self.runs)

    def consume_token(self, token: int) -> None:
        require(token in admitted(self.place, self.runs), f"token {token} at {self.place}, which the grammar does not admit")
        self.place += 1

    def compute_ff_tokens(self) -> list[int]:
        found: list[int] = []
        while len(some := admitted(self.place + len(found), self.runs)) == 1:
            found += some
        return found

    def is_error(self) -> bool:
        return False


def admitted(place: int, runs: int) -> list[int]:
    """What the grammar of a text that forces `runs` of 8 places admits there. The end comes at some place."""
    value = zlib.crc32(bytes([place // 3, runs]))
    return [1 + place % (VOCAB - 1)] if value % 8 < runs and place < 40 else list(range(VOCAB))


class Grammars:
    """Those of regular expressions that are a digit: the places of 8 that are forced."""

    def follower(self, structured: Structured, begin: int) -> Follower:
        return Follower(Matcher(0, int(str(structured.regex))), begin)

    def masks(self, followers: list[Follower], vocab_size: int) -> np.ndarray:
        found = [admitted(follower.matcher.place, follower.matcher.runs) for follower in followers]
        return np.array([[sum(1 << token for token in tokens)] for tokens in found], np.int32)


class Config(NamedTuple):
    layers: tuple[LayerSpec, ...]
    vocab_size: int = VOCAB


def layer(window: int) -> LayerSpec:
    return LayerSpec(Attention(1, 1, 1, Rope(1e4, 0), window), Dense(1))


class Model:
    """The part of a model that `Engine` uses."""

    kv_dtype = "float32"
    step_seconds = 0.0

    def __init__(self, max_seq_len: int = 48, *windows: int, recurs: bool = False):
        self.max_seq_len, self.tokenizer, self.grammars = max_seq_len, Tokenizer(), Grammars()
        recurrent = (LayerSpec(Toy(1), Dense(1)),) * recurs
        self.config = Config((*map(layer, windows or [0]), *recurrent))

    def fingerprint(self) -> str:
        return "stand-in"

    def count(self, kind: str, tokens: int, seconds: float) -> None:
        pass

    def encode(self, prompt: list[int]) -> list[int]:
        return list(prompt)

    def adapter_index(self, adapter: str | None) -> int:
        return -1 if adapter is None else ADAPTERS.index(adapter)


def expected(
    prompt: list[int], params: SamplingParams, seed: int, context: int, adapter: int = -1, begun: int = 0
) -> Completion:
    """The completion that a request gives whatever happens around it. begun: the last tokens of the prompt that belong to the
    output's grammar."""
    text, shown, reason = list(prompt), "", "length"
    while len(text) < min(len(prompt) + params.max_tokens, context):
        place, runs = len(text) - len(prompt) + begun, params.structured and int(str(params.structured.regex))
        mask = -1 if runs is None else sum(1 << token for token in admitted(place, runs))
        text.append(next_token(text, seed, adapter, mask))
        shown += "" if text[-1] == END else chr(96 + text[-1])
        if text[-1] == END and not params.ignore_eos:
            reason = "stop"
            break
        stops = [stop for stop in params.stop if shown.endswith(stop)]
        if stops:
            shown, reason = shown.removesuffix(max(stops, key=len)), "stop"
            break
    return Completion(shown, text[len(prompt) :], reason, None, list(prompt))


class _Slot(NamedTuple):
    sequence: Sequence
    text: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int

    @property
    def done(self) -> bool:
        ended = len(self.text) > self.prompt_length and self.text[-1] == END and not self.params.ignore_eos
        return ended or len(self.text) >= self.sequence.limit


class _Pending(NamedTuple):
    """What a dispatch gives, before it was fetched."""

    dispatch: Dispatch
    tokens: np.ndarray


class Executor:
    """`ferrum_jax.engine.executor.Executor` as far as the engine can tell. `fault`: where to fail next ("admit", "launch" or
    "fetch"); `struck`: sequences of the dispatches that failed so. `pages`: of each pool [pages, page_size, 3]; `states`:
    [states, 3], of a model with layers that recur: a hash of what was read, its length, and the adapter."""

    def __init__(self, model: Model, config: EngineConfig, num_pages: list[int], context: int):
        self.model, self.config, self.num_pages = model, config, num_pages
        self.recurs = bool(recurrent_kinds(model.config))  # type: ignore[arg-type]
        self.windows = [kind.window for kind in page_kinds(model.config)]  # type: ignore[arg-type]
        self.kv_dtype, self.compiles = model.kv_dtype, 0
        self.capacity = -(-context // config.page_size) * config.page_size
        self.fault = ""
        self.struck: list[Sequence] = []
        self.launches = self.forced = 0
        self.shape, self.substitutes = None, False
        self.between: Callable[[], object] = lambda: None
        self.pools: list[Any] = []
        # Pages with known text before the scheduler chose the newest dispatch.
        self.registered: list[dict[int, Any]] = [{} for _ in num_pages]
        self.reset()

    def reset(self) -> None:
        self.pages = [np.full((count, self.config.page_size, 3), -1, np.int32) for count in self.num_pages]
        self.states = np.full((self.config.num_states, 3), -1, np.int32)
        self.slots: dict[int, _Slot] = {}
        self.masks: dict[int, int] = {}
        self.broken = False

    def buckets(self) -> list[str]:
        return []

    def compile(self, bucket: str) -> None:
        pass

    def watch(self, scheduler: Any) -> None:
        """Records which pages are registered before the scheduler decides, and must not be written any more. `between` is
        called once between a decision and its launch, where another thread may come in."""
        self.pools, choose = scheduler.ledger.pools, scheduler.next

        def next(steps: int, turns: int = 0) -> Dispatch | None:
            self.registered = [dict(pool._entries) for pool in self.pools]
            self.coming = choose(steps, turns)
            between, self.between = self.between, lambda: None
            between()
            return self.coming

        scheduler.next = next

    def admit(self, sequence: Sequence, slot: int, params: SamplingParams, seed: int, extras: Any) -> None:
        self._strike("admit", self.coming)
        require(0 <= slot < self.config.max_seqs, f"admitted into slot {slot}")
        require(len(sequence.tokens) <= self.capacity, "a text that is longer than a slot")
        self.slots[slot] = _Slot(sequence, list(sequence.tokens), sequence.prompt_length, params, seed)
        self.masks.pop(slot, None)

    def mask(self, rows: list[int], forced: list[tuple[int, ...]], masks: np.ndarray) -> None:
        for slot, tokens, (mask,) in zip(rows, forced, masks.tolist(), strict=True):
            if not self.slots[slot].done:
                self.slots[slot].text.extend(tokens)
                self.masks[slot] = mask
            self.forced += len(tokens)

    def ready(self, dispatch: Dispatch) -> bool:
        return self.launches % 3 > 0

    def prepare(self, dispatch: Dispatch) -> None:
        pass

    def launch(self, dispatch: Dispatch) -> _Pending:
        self._strike("launch", dispatch)
        require(not self.broken, "a failed device goes on without a reset")
        self.launches += 1
        for pool, pages in enumerate(self.pages):
            copies = [pair for part, *pair in dispatch.copies if part == pool]
            for first in range(0, len(copies), _COPIES):
                source, target = np.asarray(copies[first : first + _COPIES]).T
                for page in target.tolist():
                    self._writable(pool, page)
                pages[target] = pages[source]
        self.copy([copy for copy in dispatch.copies if copy[0] == len(self.pages)])
        slots = [row.slot for row in dispatch.rows]
        require(len(set(slots)) == len(slots) <= self.config.max_seqs, f"slots of a dispatch: {slots}")
        for row in dispatch.rows:
            require(row.length > 0, "a row of no tokens")
            require(self.slots[row.slot].sequence is row.sequence, "a row without its slot")
        made = self._decode(dispatch) if dispatch.steps else self._mixed(dispatch)
        tokens = np.full((len(made), max(dispatch.steps, *map(len, made)) + 1), -1, np.int32)
        for i, row in enumerate(made):
            tokens[i, : len(row)] = row
        return _Pending(dispatch, tokens)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Of states alone."""
        slots = range(self.config.max_seqs)
        for first in range(0, len(copies), _COPIES):
            part, source, target = np.asarray(copies[first : first + _COPIES]).T
            require(set(part.tolist()) == {len(self.pages)}, "a copy of pages by the way")
            require(len(set(target.tolist())) == len(target), "a state is copied to a place twice at once")
            for place in {*source.tolist(), *target.tolist()}.difference(slots):
                require(place < slots.stop + self.config.num_checkpoints, f"a copy of state {place}")
            self.states[target] = self.states[source]

    def fetch(self, pending: _Pending, scored: bool, scored_prompt: bool) -> steps.Results:
        self._strike("fetch", pending.dispatch)
        return steps.Results(pending.tokens, None, None)

    def read(self, places: list[list[int]]) -> DecodeState:
        read = [pages[None, ids, :, :, None] for pages, ids in zip(self.pages, places, strict=False)]
        return self._state(read, self.states[None, places[-1]] if self.recurs else None)

    def write(self, places: list[list[int]], content: DecodeState) -> None:
        if self.recurs:
            *places, checkpoints = places
            self.states[checkpoints] = np.asarray(content.recurrent[0]["state"])[0]
        for pool, (pages, ids, new) in enumerate(zip(self.pages, places, content.pools, strict=True)):
            for page in ids:
                self._writable(pool, page)
            pages[ids] = np.asarray(new.pages)[0, ..., 0]

    def abstract_state(self) -> DecodeState:
        arrays = [jax.ShapeDtypeStruct((1, *pages.shape, 1), np.int32) for pages in self.pages]
        return self._state(arrays, jax.ShapeDtypeStruct((1, *self.states.shape), np.int32) if self.recurs else None)

    # Inside

    def _state(self, pools: list[Any], states: Any) -> DecodeState:
        recurrent = () if states is None else ({"state": states},)
        return DecodeState(tuple(KVCache(pages, None, self.kv_dtype) for pages in pools), recurrent)

    def _advance(self, row: Row, first: int, count: int) -> None:
        """The state of a row, which has read `first` tokens, reads some more."""
        text, adapter = self.slots[row.slot].text, row.sequence.adapter
        if self.recurs:
            held, right = tuple(self.states[row.slot].tolist()), state_of(text[:first], adapter)
            require(first == 0 or held == right, f"slot {row.slot} has the state {held}, not {right}")
            self.states[row.slot] = state_of(text[: first + count], adapter)
            last, place = row.keeps
            if place >= 0:
                require(0 <= last < count - 1 and (first + last + 1) % self.config.page_size == 0, "a state is kept elsewhere")
                require(self.config.max_seqs <= place < len(self.states), f"a state is kept at {place}")
                self.states[place] = state_of(text[: first + last + 1], adapter)

    def _strike(self, where: str, dispatch: Dispatch) -> None:
        if self.fault == where:
            self.fault, self.broken = "", True
            self.struck += [row.sequence for row in dispatch.rows if row.valid]
            raise Injected(where)

    def _mixed(self, dispatch: Dispatch) -> list[list[int]]:
        longest = max(self.config.token_budget, self.config.max_seqs + 1)
        require(sum(row.length for row in dispatch.rows) <= longest, "more tokens than a step is compiled for")
        live = []
        for row in dispatch.rows:
            slot = self.slots[row.slot]
            first = len(slot.text) - row.length if row.start < 0 else row.start
            if row.start >= 0 or not (slot.done or self._stuck(row)):
                self._write(row, first, slot.text[first : first + row.length])
                self._advance(row, first, row.length)
                live.append((row, first))
        for row, first in live:
            self._read(row, first, row.length)
        made: list[list[int]] = [[] for _ in dispatch.rows]
        for i, row in enumerate(dispatch.rows):
            if row.samples and not self._stuck(row) and any(row is other for other, _ in live):
                made[i].append(self._choose(row))
        return made

    def _decode(self, dispatch: Dispatch) -> list[list[int]]:
        """Steps of single tokens or, with speculation, of drafts that are partly right; the program drafts in any case."""
        made: list[list[int]] = [[] for _ in dispatch.rows]
        for _ in range(min(dispatch.steps, self.config.steps)):
            live = [(i, row) for i, row in enumerate(dispatch.rows) if not (self.slots[row.slot].done or self._stuck(row))]
            counts = {}
            for i, row in live:
                slot = self.slots[row.slot]
                first, drafted = len(slot.text) - 1, self._drafted(row, slot)
                right = zlib.crc32(bytes([self.launches % 256, first])) % (drafted + 1)
                text, draft = list(slot.text), [slot.text[-1]]
                for place in range(drafted):
                    text.append(next_token(text, slot.seed, slot.sequence.adapter))
                    draft.append(text[-1] if place < right else VOCAB)  # a wrong draft is never read
                self._write(row, first, draft)
                counts[i] = right + 1
            for i, row in live:
                first = len(self.slots[row.slot].text) - 1
                self._read(row, first, 1)
                for _ in range(counts[i]):
                    made[i].append(self._choose(row))
                    if self.slots[row.slot].done:
                        break
                self._advance(row, first, len(self.slots[row.slot].text) - 1 - first)
        return made

    def _drafted(self, row: Row, slot: _Slot) -> int:
        room = max(0, row.sequence.limit - len(slot.text) - 1) if slot.params.structured is None else 0
        return zlib.crc32(bytes([len(slot.text), self.launches % 256])) % (min(self.config.speculation, room) + 1)

    def _stuck(self, row: Row) -> bool:
        """Whether a row has a grammar and no mask: in a step before, or because it was aborted just now."""
        return self.slots[row.slot].params.structured is not None and row.slot not in self.masks

    def _choose(self, row: Row) -> int:
        slot, mask = self.slots[row.slot], self.masks.pop(row.slot, -1)
        slot.text.append(next_token(slot.text, slot.seed, slot.sequence.adapter, mask))
        return slot.text[-1]

    def _page(self, row: Row, pool: int, position: int) -> int:
        """The page of a position. A page before the window may have been given back when this dispatch was chosen, but no other
        sequence can have it yet."""
        held, number = row.held, position // self.config.page_size
        pages = held.pages[pool]
        page, given_back = int(held.table[pool, number]), number < held.behind[pool]
        holders = self.pools[pool].holders(page)
        if not row.valid:  # aborted between or just now: what it had alone is no other's before the next dispatch
            return page
        require(number < len(pages), f"position {position} has no page")
        require(given_back or pages[number] == page, f"position {position}: the table and the pages differ")
        require(holders > 0 or given_back, f"position {position}: page {page} has no holder")
        return page

    def _writable(self, pool: int, page: int, valid: bool = True) -> None:
        holders, known = self.pools[pool].holders(page), self.registered[pool].get(page)
        require(holders <= valid, f"page {page} is written and has {holders} holders")
        require(known is None or self.pools[pool]._entries.get(page) is not known, f"page {page} is written and registered")

    def _write(self, row: Row, first: int, tokens: list[int]) -> None:
        for pool, pages in enumerate(self.pages):
            for position, token in enumerate(tokens, first):
                page = self._page(row, pool, position)
                self._writable(pool, page, row.valid)
                pages[page, position % self.config.page_size] = token, position, row.sequence.adapter

    def _read(self, row: Row, first: int, length: int) -> None:
        """Everything that the queries from `first` on look at is the text of the row."""
        text = self.slots[row.slot].text
        for pool, (pages, window) in enumerate(zip(self.pages, self.windows, strict=True)):
            for position in range(max(0, first + 1 - window) if window else 0, first + length):
                page = self._page(row, pool, position)
                held = tuple(pages[page, position % self.config.page_size].tolist())
                right = text[position], position, row.sequence.adapter
                require(held == right, f"page {page} of pool {pool} holds {held}, not {right}")


def use(model: Model, config: EngineConfig) -> Engine:
    """An engine whose device is the stand-in: `engine._executor`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Executor", Executor)
        made = Engine(model, config)  # type: ignore[arg-type]
    made._executor.watch(made._scheduler)  # type: ignore[attr-defined]
    return made


def step(engine: Engine) -> bool:
    """A step, and whether anything is left to do. AssertionError for whatever goes wrong."""
    try:
        more = engine.step()
    except (Exception, Violation) as error:
        raise AssertionError(f"a step raised {error!r}") from error
    check(engine)
    return more


def drive(engine: Engine, steps: int = 1000) -> None:
    """Steps until nothing is left to do."""
    for _ in range(steps):
        if not step(engine):
            return
    raise AssertionError(f"{steps} steps were not enough: {engine.metrics()}")


def check(engine: Engine) -> None:
    """Every page is free, cached or held, by exactly the recorded holders; registered pages hold the registered text; slots are
    free or in use."""
    scheduler = engine._scheduler
    for pool in range(len(scheduler.ledger.pools)):
        _check_pool(engine, pool)
    if scheduler.ledger.checkpoints is not None:
        _check_checkpoints(engine)
    used = [sequence.slot for sequence in scheduler.running]
    assert sorted([*used, *scheduler._slots]) == list(range(engine.config.max_seqs)), "slots lost or doubled"
    for sequence in scheduler.waiting:
        assert sequence.state == "waiting", "a sequence waits in another state"
        assert not sequence.held.count and sequence.slot < 0, "a waiting sequence holds something"
    assert all(sequence.state == "running" for sequence in scheduler.running), "a sequence runs in another state"
    for sequences in (scheduler.waiting, scheduler.running):
        numbers = [sequence.number for sequence in sequences]
        assert numbers == sorted(numbers), "the order of arrival is lost"


def _check_checkpoints(engine: Engine) -> None:
    """The same of checkpoints."""
    scheduler, ledger, states = engine._scheduler, engine._scheduler.ledger, engine._executor.states  # type: ignore
    pool, size = ledger.checkpoints, ledger.page_size
    places = range(engine.config.max_seqs, engine.config.max_seqs + pool.num_pages)
    held = dict.fromkeys(places, 0)
    for sequence in scheduler.running:
        if sequence.held.checkpoint >= 0:
            held[sequence.held.checkpoint] += 1
            right = state_of(sequence.tokens[: sequence.held.checkpointed * size], sequence.adapter)
            assert tuple(states[sequence.held.checkpoint].tolist()) == right, "a checkpoint of another text"
    assert held == {place: pool.holders(place) for place in places}, "holders are not those of the sequences"
    parts = [*pool._free, *pool._cached, *(place for place, count in held.items() if count)]
    assert sorted(parts) == list(places), f"checkpoints lost or doubled: {sorted(parts)}"
    assert all(place in pool._entries for place in pool._cached), "a cached checkpoint without text"
    assert engine.config.prefix_cache or not pool._entries, "text is registered without a prefix cache"
    for place, entry in pool._entries.items():
        before = states[place, 1] - entry.length
        assert before >= 0 and before % size == 0 and 0 < entry.length <= size, "a checkpoint of another place"
        assert (entry.parent == ledger.root(states[place, 2])) == (before == 0), "a checkpoint elsewhere"


def _check_pool(engine: Engine, number: int) -> None:
    scheduler, ledger, contents = engine._scheduler, engine._scheduler.ledger, engine._executor.pages[number]  # type: ignore
    pool, size = ledger.pools[number], ledger.page_size
    held = [0] * pool.num_pages
    for sequence in scheduler.running:
        for place, page in enumerate(sequence.held.pages[number]):
            if page >= 0:
                held[page] += 1
                assert sequence.held.table[number, place] == page, "the table is not that of the pages"
        assert len(sequence.held.pages[number]) == sequence.held.count, "a pool has other pages than the sequence"
    assert held == [pool.holders(page) for page in range(pool.num_pages)], "holders are not those of the sequences"
    parts = [*pool._free, *pool._cached, *(page for page, count in enumerate(held) if count)]
    assert sorted(parts) == list(range(pool.num_pages)), f"pages lost or doubled: {sorted(parts)}"
    assert all(page in pool._entries for page in pool._cached), "a cached page without text"
    assert not any(page in pool._entries for page in pool._free), "a free page with text"
    assert {e.digest: page for page, e in pool._entries.items()} == pool._pages, "a page and its digest differ"
    assert engine.config.prefix_cache or not pool._entries, "text is registered without a prefix cache"
    for page, entry in pool._entries.items():
        content = contents[page, : entry.length]
        tokens = np.frombuffer(entry.tokens, np.int32)
        first, adapter = content[0, 1:]
        positions = np.arange(first, first + entry.length)
        assert entry.length == size or ledger.checkpoints is not None, "a page is registered before it is full"
        right = first % size == 0 and (content[:, 0] == tokens).all() and (content[:, 1] == positions).all()
        right = right and (content[:, 2] == adapter).all()
        assert bool(right), f"page {page} does not hold the text that it is registered with"
        if entry.parent in pool._pages:
            parent = contents[pool._pages[entry.parent]]
            assert parent[0, 1] == first - size, "a page does not follow its parent"
        assert (entry.parent == ledger.root(adapter)) == (first == 0), "a page at the beginning has another parent"
