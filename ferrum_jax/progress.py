"""Shows a line of text while something takes more than half a second.

The one idea: code that may take long puts itself into a `task`, and this module decides whether to draw it. Notebooks draw a
line under the cell, the command line draws if standard error is a terminal, and everything else is silent unless it calls
`show()`. The line disappears when its task is done.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["Line", "show"]

_AFTER, _EVERY = 0.5, 0.2  # seconds before a task is drawn, and between two drawings
_Item = TypeVar("_Item")


class Line(Protocol):
    """A place for the text."""

    def draw(self, text: str) -> None:
        """Replaces the text."""

    def clear(self) -> None:
        """Removes the text."""


class _Terminal:
    """The last line of standard error."""

    def draw(self, text: str) -> None:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 80
        sys.stderr.write(f"\r\x1b[2K{text[: max(1, columns - 1)]}")
        sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()


class _Notebook:
    """A line under the running cell, empty at the end."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)
            self._handle = None


class _Task:
    def __init__(self, text: str, total: int | None):
        self.text, self.total, self.done, self.begin = text, total, 0, time.monotonic()

    def __str__(self) -> str:
        far = f" {self.done:,} of {self.total:,}" if self.total else ""
        return f"{self.text}{far}, {time.monotonic() - self.begin:.0f} s"

    def update(self, done: int, text: str | None = None) -> None:
        """Sets how much is done and, if given, a new text."""
        self.done, self.text = done, text or self.text


class _Drawing:
    """The tasks of this process, and the thread that draws them while there are any."""

    def __init__(self, line: Line) -> None:
        self._line, self._shown = line, False
        self._tasks: list[_Task] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, task: _Task) -> None:
        with self._lock:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ferrum_jax progress", daemon=True)
                self._thread.start()

    def end(self, task: _Task | None = None) -> None:
        """Ends a task, or all tasks, and clears the line right away, because the caller may print next."""
        with self._lock:
            self._tasks = [] if task is None else [other for other in self._tasks if other is not task]
            if self._shown and not self._tasks:
                self._shown = False
                with contextlib.suppress(OSError):
                    self._line.clear()

    def _run(self) -> None:
        while True:
            time.sleep(_EVERY)
            with self._lock:
                if not self._tasks:
                    self._thread = None
                    return
                if old := [task for task in self._tasks if time.monotonic() - task.begin >= _AFTER]:
                    self._shown = True
                    with contextlib.suppress(OSError):  # a closed terminal does not stop the work
                        self._line.draw("; ".join(map(str, old)))


_drawing: _Drawing | None = None
_chosen = False


def show(on: bool = True, line: Line | None = None) -> None:
    """Turns the line of progress on or off.

    Args:
      on: whether to draw from now on.
      line: where to draw; None: under the cell in a notebook, otherwise on standard error.
    """
    global _drawing, _chosen
    before, _chosen = _drawing, True
    if line is None:
        line = _Notebook() if _in_notebook() else _Terminal()
    _drawing = _Drawing(line) if on else None
    if before is not None:
        before.end()


def _in_notebook() -> bool:
    return hasattr(getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel")


@contextlib.contextmanager
def task(text: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Wraps work that may take long. Yields `update(done, text=None)`, where `done` counts up to `total`."""
    if not _chosen:
        show(_in_notebook() and os.environ.get("FERRUM_JAX_PROGRESS") != "0")
    drawing, work = _drawing, _Task(text, total)
    if drawing is not None:
        drawing.begin(work)
    try:
        yield work.update
    finally:
        if drawing is not None:
            drawing.end(work)


def track(items: Sequence[_Item], text: str) -> Iterator[_Item]:
    """Yields the items, in a task that counts them."""
    with task(text, len(items)) as update:
        for number, item in enumerate(items):
            update(number)
            yield item
