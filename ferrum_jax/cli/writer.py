"""Writes a model's text to standard output, piece by piece.

In a terminal, a word is held back until it is complete and then written where it fits, so that no word is broken at the edge.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from ferrum_jax.cli.common import harmless

# Units that are not broken at the edge: a line break, blanks, or a word. Scripts without blanks can be broken after each
# character, but an opening mark does not end a line and a closing mark does not begin one.
_OPENING, _CLOSING = "（［｛「『【〈《", "、。，．：；！？）］｝」』】〉》ー々"
_WIDE = "\u2e80-\u30ff\u3100-\ua4cf\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\U00020000-\U0003ffff"
_NO_BREAK = "\xa0\u202f"
_UNITS = re.compile(
    rf"\n|[^\S\n{_NO_BREAK}]+|[{_OPENING}]*(?:(?![{_OPENING}{_CLOSING}])[{_WIDE}]|(?:[^\s{_WIDE}]|[{_NO_BREAK}])+)"
    rf"[{_CLOSING}]*|[{_OPENING}{_CLOSING}]+"
)
_FENCE_LINE = re.compile(r"(`{3,})[^`]*|(~{3,}).*")
_BULLET = re.compile(r"[-*+•]|\d+[.)]")


class Writer:
    """Writes a model's text while it is generated. In a terminal, words are not broken at the edge, even if its width changes;
    code blocks and tables stay as they are, and control characters become visible. Elsewhere the text is not changed."""

    def __init__(self, out: TextIO | None = None):
        self.out = out or sys.stdout
        self._terminal = self.out.isatty()
        self._last = ""
        self._held = ""  # may continue, so it is not written yet
        self._blanks = ""  # before the next word, unless it begins a line
        self._column = 0  # used cells of the line on the screen
        self._fence = ""  # the marks that opened a code block
        self._begins = True  # the current line of the text does not have a word yet
        self._as_is = self._in_list = self._in_word = False

    def write(self, text: str) -> None:
        if self._terminal:
            text = self._laid_out(harmless(text))
        self._put(text)

    def close(self) -> None:
        """Ends the text and its line."""
        self._put("".join(map(self._place, _UNITS.findall(self._held))))
        self._held = ""
        if self._last != "\n":
            self._put("\n")

    def _put(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
        self._last = text[-1:] or self._last

    def _laid_out(self, text: str) -> str:
        units = _UNITS.findall(self._held + text)
        self._held = ""
        if units and units[-1] != "\n" and len(units[-1]) <= self._width():
            self._held = units.pop()
        placed = "".join(map(self._place, units))
        if units and not self._held:
            self._in_word = not units[-1].isspace()  # longer than any line
        return placed

    def _width(self) -> int:
        """The cells of a line; a very large number if the terminal's width is unknown."""
        try:
            return os.get_terminal_size(self.out.fileno()).columns or 1 << 30
        except (OSError, ValueError):
            return 1 << 30

    def _place(self, unit: str) -> str:
        """The unit as it must be written: after the blanks before it, or after a line break."""
        from rich.cells import cell_len

        if unit == "\n":
            trailing = self._blanks if self._as_is else ""
            self._blanks, self._column, self._begins, self._in_word = "", 0, True, False
            self._as_is = bool(self._fence)
            return trailing + unit
        if unit.isspace():
            self._blanks += unit
            self._in_word = False
            return ""
        if self._begins:
            self._begin_line(unit)
        width, goes_on = self._width(), self._in_word
        self._in_word = False
        lead = (" " * self._column + self._blanks).expandtabs()[self._column :]
        cells = cell_len(unit)
        if not (self._as_is or goes_on) and self._column and self._column + len(lead) + cells > width:
            self._blanks, self._column, written, lead = "", 0, "\n" + unit, ""
        else:
            written, self._blanks = self._blanks + unit, ""
        self._column += len(lead) + cells
        if self._column > width:  # the terminal has continued on the next line
            self._column = (self._column - 1) % width + 1
        return written

    def _begin_line(self, word: str) -> None:
        """Decides how to write the line that begins with these blanks and this word."""
        self._begins = False
        indent = len(self._blanks.expandtabs())
        if self._fence:
            if word.startswith(self._fence) and not word.strip(self._fence[0]):
                self._fence = ""
        elif mark := _FENCE_LINE.fullmatch(word):
            self._fence, self._as_is = mark[1] or mark[2], True
        elif _BULLET.fullmatch(word):
            self._in_list, self._as_is = True, False
        else:
            self._in_list &= indent > 0
            self._as_is = word.startswith("|") or (indent >= 4 and not self._in_list)


def say(text: str, out: TextIO | None = None) -> None:
    """Writes a text and ends its line."""
    writer = Writer(out)
    writer.write(text)
    writer.close()


@contextlib.contextmanager
def waiting(text: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Shows a status line until the yielded function is called or the block ends. If that is soon, or standard output is not a
    terminal, it shows nothing."""
    ended = threading.Event()

    def show() -> None:
        from rich.console import Console

        if not ended.wait(0.5):
            with Console().status(text()) as line:
                while not ended.wait(0.5):
                    line.update(text())

    def end() -> None:
        ended.set()
        thread.join()

    thread = threading.Thread(target=show if sys.stdout.isatty() else ended.wait)
    thread.start()
    try:
        yield end
    finally:
        end()
