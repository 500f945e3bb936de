"""Which sequence holds which part of a DecodeState: the host's only interface to it, for all kinds of state.

A text is cut into pages of `page_size` tokens, and page n of a text is one page in each pool. So a sequence has one count of
pages, one chain of digests, and a table with a row for each pool. The pools differ in what their layers look at: layers with a
window need only the pages within it, so pages before it are given back, and the beginning of a text is found if each pool has
what its layers will look at.

Layers that recur have one state of a text, at its end. A running sequence has it in the place of its slot. A checkpoint is a
copy of it, or is written in addition to it by the step that passes it: it is found, shared and evicted like pages, and the
beginning of a text is found only up to a checkpoint. A state is as large as the pages of thousands of tokens, so a sequence
makes few: before the last page of its prompt, where its text diverges from a known one, at its end, so that a conversation
continues from there, and if the configuration has room for more, at the multiples of a stride in its prompt. All but that at
the end of the text are at the end of a page, and each sequence holds the newest of them. At its end the last page is registered
for the tokens that it has, and a text that continues from there begins with a copy of it. A checkpoint whose last page is
evicted goes with it, because it is not found any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.pages import Entry, PagePool, entry, root


class Held:
    """What a sequence holds: `count` pages of each pool. pages: their numbers for each pool, -1 for those given back (before a
    window; the first `behind` are done); table: int32 [pools, most], the same for the device; digests: of the registered ones
    among the first full pages; settles_at: the number of known tokens from which `settle` has something to do. checkpoint: the
    place of the newest checkpoint, -1 for none; it covers the first `checkpointed` pages and is `fresh` until it is registered;
    stops: numbers of pages after which further ones are to be made."""

    __slots__ = ("behind", "checkpoint", "checkpointed", "count", "digests", "fresh", "pages", "settles_at", "stops", "table")

    def __init__(self, pools: int = 0, most: int = 0):
        self.count = 0
        self.pages: list[list[int]] = [[] for _ in range(pools)]
        self.behind = [0] * pools
        self.table = np.zeros((pools, most), np.int32)
        self.digests: list[bytes] = []
        self.settles_at = 0
        self.checkpoint, self.checkpointed, self.fresh = -1, 0, False
        self.stops: list[int] = []

    def append(self, pages: Sequence[int]) -> None:
        for held, row, page in zip(self.pages, self.table, pages, strict=True):
            held.append(page)
            row[self.count] = max(page, 0)
        self.count += 1


class Found(NamedTuple):
    """The beginning of a text that is in the state. pages: full ones for each pool, -1 for those before its window; digests: of
    those that are registered; rest: in each pool the page whose beginning holds the next `more` tokens, to be copied;
    checkpoint: of the layers that recur, -1 for none; known: how many pages would be found if there were a checkpoint after
    them."""

    pages: list[list[int]]
    digests: list[bytes]
    rest: list[int] | None = None
    checkpoint: int = -1
    known: int = 0
    more: int = 0

    @property
    def full(self) -> int:
        """The number of full pages."""
        return len(self.pages[0])


class Reserved(NamedTuple):
    """A page about to be written with the content at `place` in the content of a pool."""

    page: int
    place: int
    entry: Entry


def pages_at_once(window: int, config: EngineConfig) -> int:
    """The largest number of pages that a sequence holds in a pool whose layers see `window` positions."""
    return -(-(window + config.at_once) // config.page_size) + 2


def pool_sizes(windows: Sequence[int], num_pages: int, config: EngineConfig) -> list[int]:
    """Pages of each pool, by the windows of its layers (0: none): `num_pages` for the layers that see farthest, for others as
    many as `max_seqs` sequences can hold."""
    farthest = 0 if 0 in windows else max(windows)
    most = [num_pages if window == farthest else config.max_seqs * pages_at_once(window, config) for window in windows]
    return [min(num_pages, size) for size in most]


class Ledger:
    """The pools of a state: for each the window of its layers (0: none) and the number of its pages.

    context: limit of tokens in a sequence; salt: names the model that the contents of pages depend on; recurs: whether there
    are layers that recur.
    """

    def __init__(
        self,
        config: EngineConfig,
        windows: Sequence[int],
        num_pages: Sequence[int],
        context: int,
        salt: bytes = b"",
        recurs: bool = False,
    ):
        self.config, self.page_size, self.windows = config, config.page_size, list(windows)
        self.checkpoints = PagePool(config.num_checkpoints, config.max_seqs) if recurs else None
        self.pools = [PagePool(count, evicted=self.checkpoints.drop if self.checkpoints else None) for count in num_pages]
        self.stride = config.stride(context)
        self.pages_a_sequence = self.count(context)
        self.windowed = [pool for pool, window in enumerate(windows) if window]
        self.made = self.hits = 0  # checkpoints, and sequences that began from one
        self._salt = salt

    # How much there is

    @property
    def available(self) -> int:
        """The number of pages by which a sequence can grow."""
        return min(pool.available for pool in self.pools)

    @property
    def free(self) -> int:
        return sum(pool.free for pool in self.pools)

    @property
    def cached(self) -> int:
        return sum(pool.cached for pool in self.pools)

    @property
    def evictions(self) -> int:
        return sum(pool.evictions for pool in self.pools)

    def count(self, tokens: int) -> int:
        """How many pages `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    def pages_needed(self, tokens: int) -> list[int]:
        """Pages of each pool that a single sequence needs at once to grow to `tokens` tokens; the last token is never
        written."""
        pages = self.count(tokens - 1)
        return [min(pages, pages_at_once(window, self.config)) if window else pages for window in self.windows]

    # What a sequence holds

    def admit(self, found: Found, tokens: int, slot: int, reserve: bool) -> tuple[Held, list[tuple[int, int, int]]] | None:
        """What a sequence of `tokens` tokens holds at its start in a slot, and the copies to make before it runs, as (part of
        the state, source, target); None if there is no room for the rest of it. reserve: whether to leave some pages to
        others."""
        self.share(found)
        needed = self.pages_needed(tokens + 1)
        for pool, pages, most in zip(self.pools, found.pages, needed, strict=True):
            watermark = max(1, pool.num_pages // 100) if reserve else 0
            if pool.available < most - sum(page >= 0 for page in pages) + watermark:
                self.release(found)
                return None
        held, copies = Held(len(self.pools), self.pages_a_sequence), []
        held.digests = found.digests
        for numbers in zip(*found.pages, strict=True):
            held.append(numbers)
        if found.rest is not None:
            held.append([pool.take() for pool in self.pools])
            copies = [(number, page, held.pages[number][-1]) for number, page in enumerate(found.rest)]
        if self.checkpoints is not None:
            last, stride = (tokens - 1) // self.page_size, self.stride
            on_the_way = range(stride, last, stride) if stride else ()
            held.stops = sorted({*on_the_way, found.known, last} - set(range(found.full + 1)))
            self.hits += found.checkpoint >= 0
            if found.checkpoint >= 0:
                copies.append((len(self.pools), found.checkpoint, slot))
            if found.more:  # inside a page no branch of this sequence goes on, and a conversation goes on from its newest end
                self.checkpoints.give_back(found.checkpoint, first=True)
            else:
                held.checkpoint, held.checkpointed = found.checkpoint, found.full
        return held, copies

    def at_most(self, held: Held, prefilled: int, count: int) -> int:
        """How many of the next `count` tokens of a prompt may be read at once: a step passes one stop."""
        beyond = [stop * self.page_size for stop in held.stops if stop * self.page_size > prefilled][1:2]
        return min([count, *(stop - prefilled for stop in beyond)])

    def checkpoint(self, held: Held, prefilled: int, slot: int) -> list[tuple[int, int, int]]:
        """The copies that make a checkpoint of a sequence that has read `prefilled` tokens, if it has a stop there and a place
        is free."""
        here = held.stops and held.stops[0] * self.page_size == prefilled
        return [(len(self.pools), slot, held.checkpoint)] if here and self._takes_checkpoint(held) else []

    def passed(self, held: Held, prefilled: int, count: int) -> tuple[int, int]:
        """The stop that a sequence passes inside its next `count` tokens: the index of the last of them before it, and the
        place for a checkpoint; (-1, -1) if there is none."""
        here = held.stops and prefilled < held.stops[0] * self.page_size < prefilled + count
        last = held.stops[0] * self.page_size - prefilled - 1 if here else -1
        return (last, held.checkpoint) if here and self._takes_checkpoint(held) else (-1, -1)

    def end(self, held: Held, tokens: Sequence[int], written: int, adapter: int, slot: int) -> list[tuple[int, int, int]]:
        """The copies that make a checkpoint of a sequence that ends with `written` tokens, where there is a place. It is found
        from now on."""
        number = (written - 1) // self.page_size
        if self.checkpoints is None or not self.config.prefix_cache or len(held.digests) < number:
            return []
        parent = held.digests[number - 1] if number else self.root(adapter)
        known = entry(parent, tokens[number * self.page_size : written])
        if held.checkpoint >= 0:  # of its prompt; the end is newer, and takes its place if no other is free
            self.checkpoints.give_back(held.checkpoint)
            held.checkpoint, held.checkpointed = -1, 0
        if not self.checkpoints.available or self.checkpoints.find(known) is not None:
            return []
        for pool, pages in zip(self.pools, held.pages, strict=True):
            if pages[number] >= 0:
                pool.register(pages[number], known)  # a full one is already
        place, self.made = self.checkpoints.take(), self.made + 1
        self.checkpoints.register(place, known)
        self.checkpoints.give_back(place)
        return [(len(self.pools), slot, place)]

    def grow(self, held: Held, tokens: int) -> bool:
        """Takes pages for `tokens` tokens; False if a pool has none left."""
        needed = -(-tokens // self.page_size)
        while held.count < needed:
            if not self.available:
                return False
            held.append([pool.take() for pool in self.pools])
        return True

    def settle(self, held: Held, tokens: Sequence[int], written: int, adapter: int) -> None:
        """Registers the pages that are full of known tokens, given `written` tokens, and gives back those that no layer of
        their pool will look at again."""
        size = self.page_size
        while self.config.prefix_cache and (len(held.digests) + 1) * size <= written:
            number = len(held.digests)
            parent = held.digests[-1] if number else self.root(adapter)
            known = entry(parent, tokens[number * size : (number + 1) * size])
            held.digests.append(known.digest)
            for pool, pages in zip(self.pools, held.pages, strict=True):
                if pages[number] >= 0:
                    pool.register(pages[number], known)
        if held.fresh and len(held.digests) >= held.checkpointed:
            self._register_checkpoint(held, tokens, adapter)
        for windowed in self.windowed:
            pages = held.pages[windowed]
            while held.behind[windowed] < self._behind(windowed, written):
                number = held.behind[windowed]
                if pages[number] >= 0:
                    self.pools[windowed].give_back(pages[number])
                    pages[number] = -1
                held.behind[windowed] += 1
        held.settles_at = 0 if self.windowed or held.fresh else (len(held.digests) + 1) * size

    def give_back(self, held: Held) -> None:
        """Gives back everything that a sequence holds, last page first."""
        self.release(Found(held.pages, [], checkpoint=held.checkpoint))

    # Texts

    def root(self, adapter: int = -1) -> bytes:
        return root(self._salt, adapter)

    def nothing(self) -> Found:
        return Found([[] for _ in self.pools], [])

    def find(self, tokens: Sequence[int], adapter: int = -1, *, inside: bool = True) -> Found:
        """The longest registered beginning of a text for which each pool has everything that its layers look at from there on.
        The last token is always left out: its logits must be computed, in a page that is not shared. inside: whether it may end
        inside a page, where another text has ended."""
        found, best, reached, checkpoint = self.nothing(), 0, 0, -1
        gaps = [0] * len(self.pools)  # in each pool the first page after the latest missing one
        parent = self.root(adapter)
        end: tuple[int, list[int], int, int] | None = None  # full, rest, checkpoint and more
        ends = [] if self.checkpoints is None or not inside else self.checkpoints.entries(below=self.page_size)
        for start in range(0, len(tokens), self.page_size):
            for place, known in ends:
                if known.parent == parent and known.begins(tokens[start:-1]) and self._sees(gaps, start + known.length):
                    rest = [page for pool in self.pools if (page := pool.find(known)) is not None]
                    end = (found.full, rest, place, known.length) if len(rest) == len(self.pools) else end
            if start + self.page_size >= len(tokens):
                break
            known = entry(parent, tokens[start : start + self.page_size])
            parent = known.digest
            found.digests.append(parent)
            for number, pool in enumerate(self.pools):
                page = pool.find(known)
                found.pages[number].append(-1 if page is None else page)
                if page is None:
                    gaps[number] = found.full
            if any(gap and not window for gap, window in zip(gaps, self.windows, strict=True)):
                break
            if self._sees(gaps, found.full * self.page_size):
                reached = found.full
                state = -1 if self.checkpoints is None else self.checkpoints.find(known)
                if state is not None:
                    best, checkpoint = reached, state
        if end is not None and end[0] >= best:
            full, rest, checkpoint, more = end
            return self._cut(found, full)._replace(rest=rest, checkpoint=checkpoint, known=reached, more=more)
        return self._cut(found, best)._replace(checkpoint=checkpoint, known=reached)

    def written(self, held: Held, written: int) -> Found:
        """The full pages of a sequence with `written` tokens written, in the form of `find`; nothing if a part that would be
        looked at from there on was given back."""
        full = written // self.page_size if self.checkpoints is None else held.checkpointed
        if any(held.behind[pool] > self._behind(pool, full * self.page_size) for pool in self.windowed):
            return self.nothing()
        return self._cut(Found(held.pages, held.digests, None, held.checkpoint), full)

    def branch(self, held: Held, last: int) -> Found | None:
        """What a sequence holds of its text before position `last`, for a branch that continues there; None if a part that the
        branch would look at was given back."""
        if self.checkpoints is not None:
            found = self.written(held, last)
            return found if found.full and found.full * self.page_size <= last else None
        if any(held.behind[pool] > self._behind(pool, last) for pool in self.windowed):
            return None
        full, more = divmod(last, self.page_size)
        rest = [pages[full] for pages in held.pages] if more else None
        return Found([pages[:full] for pages in held.pages], held.digests[:full], rest, more=more)

    def share(self, found: Found) -> None:
        """Counts one more holder of full pages and their checkpoint."""
        for pool, pages in self._places(found):
            for page in pages:
                if page >= 0:
                    pool.share(page)

    def release(self, found: Found) -> None:
        """Counts one holder less of full pages, last page first, and their checkpoint."""
        for pool, pages in self._places(found):
            for page in reversed(pages):
                if page >= 0:
                    pool.give_back(page)

    def reserve(self, text: Sequence[int], full: int, counts: Sequence[int], adapter: int) -> list[list[Reserved]]:
        """Takes free places for the unregistered ones of the first `full` pages of a text; in each part of the state for the
        last `counts` of them, while places are free."""
        pools = self._all
        reserved: list[list[Reserved]] = [[] for _ in pools]
        parent = self.root(adapter)
        for number in range(full):
            known = entry(parent, text[number * self.page_size : (number + 1) * self.page_size])
            parent = known.digest
            for pool, pages, count in zip(pools, reserved, counts, strict=True):
                place = number - (full - count)
                if place >= 0 and pool.free and pool.find(known) is None:
                    pages.append(Reserved(pool.take(), place, known))
        return reserved

    def publish(self, reserved: list[list[Reserved]]) -> None:
        """Registers reserved pages, which now hold their texts, and gives them back."""
        for pool, pages in zip(self._all, reserved, strict=True):
            for page, _, known in pages:
                pool.register(page, known)
            for page, *_ in reversed(pages):
                pool.give_back(page)

    def places(self, found: Found) -> list[list[int]]:
        """The places found, for each part of the state."""
        return [[page for page in pages if page >= 0] for _, pages in self._places(found)]

    def forget(self) -> None:
        """Forgets all registered text; held pages stay held."""
        for pool in self._all:
            pool.reset()

    def clear(self) -> None:
        """Forgets all text and all holders: everything is free."""
        for pool in self._all:
            pool.clear()

    # Inside

    @property
    def _all(self) -> list[PagePool]:
        return self.pools if self.checkpoints is None else [*self.pools, self.checkpoints]

    def _places(self, found: Found) -> Iterator[tuple[PagePool, list[int]]]:
        """The places found, for each pool."""
        yield from zip(self.pools, found.pages, strict=True)
        if self.checkpoints is not None:
            yield self.checkpoints, [found.checkpoint]

    def _takes_checkpoint(self, held: Held) -> bool:
        """Whether a place is free for a checkpoint at the next stop; the sequence holds it then."""
        assert self.checkpoints is not None
        full = held.stops.pop(0)
        if held.checkpoint >= 0:
            self.checkpoints.give_back(held.checkpoint)
            held.checkpoint, held.checkpointed = -1, 0
        if self.checkpoints.available:
            held.checkpoint, held.checkpointed, held.fresh = self.checkpoints.take(), full, True
            held.settles_at = 0
            self.made += 1
        return held.checkpoint >= 0

    def _register_checkpoint(self, held: Held, tokens: Sequence[int], adapter: int) -> None:
        """Registers a checkpoint so that it can be found."""
        assert self.checkpoints is not None
        number, held.fresh = held.checkpointed - 1, False
        parent = held.digests[number - 1] if number else self.root(adapter)
        text = tokens[number * self.page_size : held.checkpointed * self.page_size]
        self.checkpoints.register(held.checkpoint, entry(parent, text))

    def _behind(self, pool: int, position: int) -> int:
        """The number of pages of a pool that no layer looks at from this position on."""
        window = self.windows[pool]
        return max(0, position + 1 - window) // self.page_size if window else 0

    def _sees(self, gaps: Sequence[int], position: int) -> bool:
        """Whether all pools have what is looked at from a position on, where in each the pages before `gaps` may be missing."""
        return all(gap <= self._behind(pool, position) for pool, gap in enumerate(gaps))

    def _cut(self, found: Found, full: int) -> Found:
        """The first `full` pages, without those that are before the windows there."""
        pages = [numbers[:full] for numbers in found.pages]
        for pool in self.windowed:
            behind = self._behind(pool, full * self.page_size)
            pages[pool][:behind] = [-1] * behind
        return found._replace(pages=pages, digests=found.digests[:full])
