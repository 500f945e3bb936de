"""Which pages of a pool are held, and which ones hold text that another request could use; all on the host.

A page is free, held by one or more sequences (counted), or cached: not held, but full of known tokens and found by their hash
until the page is needed. Only full pages are registered, and a full page is never written again, so sharing needs no copy. The
cached page that was unused for longest is reused first. A sequence gives its pages back from the last to the first, so the end
of a text is reused before its beginning, without which it could not be found.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """The content of a registered page: its digest, that of the page before it, and its token ids as bytes."""

    digest: bytes
    parent: bytes
    tokens: bytes

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.tokens) // np.dtype(np.int32).itemsize

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether a text begins with these tokens."""
        return np.asarray(tokens[: self.length], np.int32).tobytes() == self.tokens


def entry(parent: bytes, tokens: Sequence[int]) -> Entry:
    """The entry of a page that `tokens` fill, or begin, after the page with digest `parent`."""
    data = np.asarray(tokens, np.int32).tobytes()
    return Entry(hashlib.blake2b(parent + data, digest_size=16).digest(), parent, data)


def root(salt: bytes, adapter: int = -1) -> bytes:
    """The parent of the first page of a text read with an adapter (-1: none) by the model that `salt` names."""
    return hashlib.blake2b(salt + f" adapter {adapter}".encode(), digest_size=16).digest()


class PagePool:
    """Pages first .. first + num_pages - 1. Counts `evictions`: cached pages that were forgotten. evicted: is called with what
    a page has held that is given to another text."""

    def __init__(self, num_pages: int, first: int = 0, evicted: Callable[[Entry], object] | None = None):
        self.num_pages, self._first, self._evicted = num_pages, first, evicted
        self.evictions = 0
        self._entries: dict[int, Entry] = {}
        self._pages: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # registered but not held; unused for longest first
        self.clear()

    @property
    def free(self) -> int:
        """The number of pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """The number of registered pages that are not held."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """The number of pages that `take` can return."""
        return len(self._free) + len(self._cached)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self) -> int:
        """A page for one holder: a free one, else the cached one unused for longest. Call only with `available` > 0."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            known = self._forget(page)
            if self._evicted is not None:
                self._evicted(known)
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Counts one more holder of a page that is held or cached."""
        if not self._holders[page]:
            del self._cached[page]
        self._holders[page] += 1

    def give_back(self, page: int, *, first: bool = False) -> None:
        """Counts one holder less; with none left, a registered page becomes cached and any other page free. first: as if it
        were unused for longest."""
        if not self._holders[page]:
            raise RuntimeError(f"page {page} was given back more often than it was taken")
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._entries:
                self._cached[page] = None
                self._cached.move_to_end(page, last=not first)
            else:
                self._free.append(page)

    def register(self, page: int, entry: Entry) -> None:
        """Registers a held page as full of the text of `entry`. If that text is already registered, nothing changes: the first
        page is kept."""
        if entry.digest not in self._pages and page not in self._entries:
            self._entries[page], self._pages[entry.digest] = entry, page

    def find(self, entry: Entry) -> int | None:
        """The page that holds a text. The contents are compared, not only the digests."""
        page = self._pages.get(entry.digest)
        return None if page is None or self._entries[page] != entry else page

    def entries(self, below: int) -> list[tuple[int, Entry]]:
        """The pages that are registered with fewer tokens than `below`, and what they hold; those with the fewest first."""
        found = ((page, known) for page, known in self._entries.items() if known.length < below)
        return sorted(found, key=lambda each: each[1].length)

    def drop(self, entry: Entry) -> None:
        """Forgets a text: its page becomes free, once it is not held."""
        page = self.find(entry)
        if page is None:
            return
        if self._holders[page]:
            del self._pages[self._entries.pop(page).digest]
        else:
            del self._cached[page]
            self._forget(page)
            self._free.append(page)

    def reset(self) -> None:
        """Forgets all registered text; held pages stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._entries.clear()
        self._pages.clear()

    def clear(self) -> None:
        """Forgets all text and all holders: every page is free."""
        self._entries.clear()
        self._pages.clear()
        self._cached.clear()
        self._free = list(range(self._first + self.num_pages - 1, self._first - 1, -1))
        self._holders = [0] * (self._first + self.num_pages)

    def _forget(self, page: int) -> Entry:
        """What a cached page that is evicted has held."""
        self.evictions += 1
        known = self._entries.pop(page)
        del self._pages[known.digest]
        return known
