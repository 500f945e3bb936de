"""Who holds what of a DecodeState: the host's one interface to it, whatever kinds of state a model has.

A text is cut into pages of `page_size` tokens, and page n of a text is one page in each pool. So a sequence has one count
of pages, one chain of digests, and a table with a row for each pool. The pools differ in what their layers look at: those
with a window need the pages within it alone, so those behind it are given back, and the beginning of a text is found where
each pool has what its layers will look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ferrum_jax.engine.pages import Entry, PagePool, entry, root


class Held:
    """What a sequence holds: `count` pages of each pool. pages: their numbers for each pool, -1 for those that were given
    back (behind a window; `behind` are passed); table: int32 [pools, most], the same for the device; digests: of the first
    full pages, those that are registered."""

    __slots__ = ("behind", "count", "digests", "pages", "table")

    def __init__(self, pools: int = 0, most: int = 0):
        self.count = 0
        self.pages: list[list[int]] = [[] for _ in range(pools)]
        self.behind = [0] * pools
        self.table = np.zeros((pools, most), np.int32)
        self.digests: list[bytes] = []

    def append(self, pages: Sequence[int]) -> None:
        for held, row, page in zip(self.pages, self.table, pages, strict=True):
            held.append(page)
            row[self.count] = max(page, 0)
        self.count += 1


class Found(NamedTuple):
    """The beginning of a text that is there. pages: full ones for each pool, -1 for those behind its window; digests: of
    those that are registered; rest: in each pool the page whose beginning holds the rest of the text, to be copied."""

    pages: list[list[int]]
    digests: list[bytes]
    rest: list[int] | None = None

    @property
    def full(self) -> int:
        """How many full pages."""
        return len(self.pages[0])


class Reserved(NamedTuple):
    """A page of a pool that is about to be written with page `number` of a text."""

    page: int
    number: int
    entry: Entry


class Ledger:
    """The pools of a state: for each the number of its pages and the window of its layers (0: none).

    page_size: tokens of a page; context: tokens of a sequence at most; at_once: tokens that a step may add to a sequence;
    remembers: whether pages are found again by their text; salt: names the model that their contents depend on.
    """

    def __init__(
        self,
        num_pages: Sequence[int],
        windows: Sequence[int],
        page_size: int,
        *,
        context: int,
        at_once: int = 1,
        remembers: bool = True,
        salt: bytes = b"",
    ):
        self.pools = [PagePool(count) for count in num_pages]
        self.windows, self.page_size, self.at_once, self.remembers = list(windows), page_size, at_once, remembers
        self.pages_a_sequence = -(-context // page_size)
        self._windowed = [pool for pool, window in enumerate(windows) if window]
        self._salt = salt

    # How much there is

    @property
    def available(self) -> int:
        """Pages that a sequence can grow by."""
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
        """How many pages so many tokens fill."""
        return -(-tokens // self.page_size)

    def pages_needed(self, tokens: int) -> list[int]:
        """Pages of each pool that a sequence alone needs at once to grow to so many tokens; the last one is never written."""
        pages = self.count(tokens - 1)
        return [min(pages, self.count(window + self.at_once) + 2) if window else pages for window in self.windows]

    # What a sequence holds

    def admit(self, found: Found, tokens: int, reserve: bool) -> tuple[Held, list[tuple[int, int, int]]] | None:
        """What a sequence of so many tokens holds at its beginning, and the pages to copy before it runs, as (pool, source,
        target); None where there is no room for the rest of it. reserve: whether to leave some pages to others."""
        self.share(found)
        needed = self.pages_needed(tokens)
        for pool, pages, most in zip(self.pools, found.pages, needed, strict=True):
            watermark = max(1, pool.num_pages // 100) if reserve else 0
            if pool.available < most - sum(page >= 0 for page in pages) + watermark:
                self.release(found)
                return None
        held = Held(len(self.pools), self.pages_a_sequence)
        held.digests = found.digests
        for numbers in zip(*found.pages, strict=True):
            held.append(numbers)
        if found.rest is None:
            return held, []
        held.append([pool.take() for pool in self.pools])
        return held, [(number, page, held.pages[number][-1]) for number, page in enumerate(found.rest)]

    def grow(self, held: Held, tokens: int) -> bool:
        """Takes pages for so many tokens; False where a pool has none left."""
        needed = self.count(tokens)
        while held.count < needed:
            if not self.available:
                return False
            held.append([pool.take() for pool in self.pools])
        return True

    def settle(self, held: Held, tokens: Sequence[int], written: int, adapter: int) -> None:
        """Registers the pages that are full of known tokens once so many are written, and gives back those that no layer of
        their pool will look at again."""
        size = self.page_size
        while self.remembers and (len(held.digests) + 1) * size <= written:
            number = len(held.digests)
            parent = held.digests[-1] if number else self.root(adapter)
            known = entry(parent, tokens[number * size : (number + 1) * size])
            held.digests.append(known.digest)
            for pool, pages in zip(self.pools, held.pages, strict=True):
                if pages[number] >= 0:
                    pool.register(pages[number], known)
        for windowed in self._windowed:
            pages = held.pages[windowed]
            while held.behind[windowed] < self._behind(windowed, written):
                number = held.behind[windowed]
                if pages[number] >= 0:
                    self.pools[windowed].give_back(pages[number])
                    pages[number] = -1
                held.behind[windowed] += 1

    def give_back(self, held: Held) -> None:
        """All that a sequence holds, from its end on."""
        self.release(Found(held.pages, []))

    # Texts

    def root(self, adapter: int = -1) -> bytes:
        return root(self._salt, adapter)

    def nothing(self) -> Found:
        return Found([[] for _ in self.pools], [])

    def find(self, tokens: Sequence[int], adapter: int = -1) -> Found:
        """The longest beginning of a text that is registered. The last token is always left out: its logits have to be
        computed, in a page that no other sequence shares."""
        found = self.nothing()
        parent = self.root(adapter)
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            known = entry(parent, tokens[start : start + self.page_size])
            pages = [page for pool in self.pools if (page := pool.find(known)) is not None]
            if len(pages) < len(self.pools):
                break
            parent = known.digest
            found.digests.append(parent)
            for held, page in zip(found.pages, pages, strict=True):
                held.append(page)
        for windowed in self._windowed:
            behind = self._behind(windowed, found.full * self.page_size)
            found.pages[windowed][:behind] = [-1] * behind
        return found

    def written(self, held: Held, written: int) -> Found:
        """The full pages of a sequence of which so many tokens are written."""
        count = written // self.page_size
        return Found([pages[:count] for pages in held.pages], held.digests[:count])

    def branch(self, held: Held, last: int) -> Found | None:
        """What a sequence holds of its text before position `last`, for a branch that goes on there; None where a page that
        the branch would look at was given back."""
        if any(held.behind[pool] > self._behind(pool, last) for pool in self._windowed):
            return None
        full, more = divmod(last, self.page_size)
        rest = [pages[full] for pages in held.pages] if more else None
        return Found([pages[:full] for pages in held.pages], held.digests[:full], rest)

    def share(self, found: Found) -> None:
        """Counts one holder more of full pages."""
        for pool, pages in zip(self.pools, found.pages, strict=True):
            for page in pages:
                if page >= 0:
                    pool.share(page)

    def release(self, found: Found) -> None:
        """Counts one holder less of full pages, from the end on."""
        for pool, pages in zip(self.pools, found.pages, strict=True):
            for page in reversed(pages):
                if page >= 0:
                    pool.give_back(page)

    def reserve(self, text: Sequence[int], count: int, adapter: int) -> list[list[Reserved]]:
        """Free pages of each pool for those of the first `count` of a text that are not registered, until it has none."""
        reserved: list[list[Reserved]] = [[] for _ in self.pools]
        parent = self.root(adapter)
        for number in range(count):
            known = entry(parent, text[number * self.page_size : (number + 1) * self.page_size])
            parent = known.digest
            for pool, pages in zip(self.pools, reserved, strict=True):
                if pool.free and pool.find(known) is None:
                    pages.append(Reserved(pool.take(), number, known))
        return reserved

    def publish(self, reserved: list[list[Reserved]]) -> None:
        """Registers reserved pages, which hold their texts now, and lets go of them."""
        for pool, pages in zip(self.pools, reserved, strict=True):
            for page, _, known in pages:
                pool.register(page, known)
        self.release(Found([[page for page, *_ in pages] for pages in reserved], []))

    def forget(self) -> None:
        """Forgets all registered text; pages that are held stay held."""
        for pool in self.pools:
            pool.reset()

    def clear(self) -> None:
        """Forgets all text and all holders: everything is free."""
        for pool in self.pools:
            pool.clear()

    # Inside

    def _behind(self, pool: int, position: int) -> int:
        """How many pages of a pool no layer looks at from this position on."""
        return max(0, position + 1 - self.windows[pool]) // self.page_size
