"""Reading a text that arrives in pieces as if all of it were there.

A format is a generator that takes what it understands from a `Reader`. Where it needs text that has not arrived, it yields None
and later goes on at the same place; everything else that it yields is an event. So a format has no states to keep, and as long
as it looks at the text only through these methods, its events do not depend on where the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

from ferrum_jax.parsing.events import Arguments, Event

T = TypeVar("T")
Steps = Generator[Event | None, None, T]
Give = Callable[[str], Event]
_SPACES = re.compile(r"[ \t\r\n]*")
_SPACE = " \t\r\n"


def silently(_: str) -> Event:
    """For text that is not given as an event."""
    return Arguments("")


class Reader:
    """`text`: what has arrived, from some place on; `at`: what is next in it; `ended`: no more arrives. `dropped`: the space
    that `until` has left out before its mark."""

    def __init__(self) -> None:
        self.text, self.at, self.ended, self.dropped = "", 0, False, ""

    @property
    def rest(self) -> str:
        """What has arrived and was not taken."""
        return self.text[self.at :]

    @property
    def finished(self) -> bool:
        return self.ended and self.at == len(self.text)

    def forget(self) -> None:
        """Places before this one are not needed any more."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Steps[bool]:
        """Waits for more text; whether some has arrived."""
        size = len(self.text)
        while not self.ended and len(self.text) == size:
            yield None
        return len(self.text) > size

    def ahead(self, count: int) -> Steps[str]:
        """The next letters, as many as there are up to `count`, without taking them."""
        while len(self.text) - self.at < count and (yield from self.more()):
            pass
        return self.text[self.at : self.at + count]

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Takes the longest text that a pattern of single letters matches."""
        start = self.at
        while True:
            found = pattern.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or not (yield from self.more()):
                return self.text[start : self.at]

    def space(self) -> Steps[str]:
        """Takes white space."""
        return (yield from self.run(_SPACES))

    def takes(self, *marks: str) -> Steps[str]:
        """Takes the longest of some marks that is next and returns it, or ""."""
        while any(len(mark) > len(self.text) - self.at and mark.startswith(self.rest) for mark in marks):
            if not (yield from self.more()):
                break
        found = max((mark for mark in marks if self.text.startswith(mark, self.at)), key=len, default="")
        self.at += len(found)
        return found

    def until(self, marks: tuple[str, ...], give: Give, *, trim: str = "", keep: bool = False) -> Steps[str]:
        """Gives the text before the first of some marks, takes the mark and returns it; "" at the end of the text.

        Args:
          trim: letters that are left out, as `dropped`, directly before a mark.
          keep: places before this one are still needed.
        """
        while True:
            place, mark = self._find(marks)
            last = self.ended and not mark
            shown = self.text[self.at : place]
            shown = shown if last else shown.rstrip(trim)
            self.at += len(shown)
            yield give(shown)
            if mark:
                self.dropped, self.at = self.text[self.at : place], place + len(mark)
                return mark
            if last:
                return ""
            if not keep:
                self.forget()
            yield from self.more()

    def before(self, *marks: str) -> Steps[tuple[str, str]]:
        """Takes the text before the first of some marks, and the mark. Returns both; the mark is "" at the end of the text."""
        start = self.at
        mark = yield from self.until(marks, silently, keep=True)
        return self.text[start : self.at - len(mark)], mark

    def _find(self, marks: tuple[str, ...]) -> tuple[int, str]:
        """The place of the first mark, and the mark. It is "" if none is there: then one might begin at the place."""
        at, longest = self.at, max(map(len, marks), default=0)
        begins = _beginnings(marks)
        while begins and (found := begins.search(self.text, at)):
            at = found.start()
            tail = self.text[at : at + longest]
            if not self.ended and any(len(mark) > len(tail) and mark.startswith(tail) for mark in marks):
                return at, ""
            if full := [mark for mark in marks if tail.startswith(mark)]:
                return at, max(full, key=len)
            at += 1
        return len(self.text), ""


@lru_cache(maxsize=256)
def _beginnings(marks: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds the first letter of any of the marks."""
    return re.compile("[" + re.escape("".join(sorted({mark[0] for mark in marks}))) + "]") if marks else None
