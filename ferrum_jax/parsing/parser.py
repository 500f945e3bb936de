"""Splits an answer of a model into reasoning, content and calls of functions while it arrives."""

from __future__ import annotations

from collections.abc import Iterator

from ferrum_jax.parsing import formats, harmony
from ferrum_jax.parsing.dialect import Dialect, Thinking
from ferrum_jax.parsing.events import Answer, Arguments, Call, CallEnd, Content, Event, Reasoning, joined
from ferrum_jax.parsing.reader import Reader, Steps
from ferrum_jax.parsing.tools import Tools

_TURN = "<|start|>assistant"


class Parser:
    """The events of one answer. However a text is cut into pieces, they add up to the same `Answer`.

    Args:
      dialect: how the model writes.
      tools: the functions that may be called; None: what looks like a call is content.
      prompt: the text before the answer; its end may have opened the reasoning.
      begun: the part of the answer that is at the end of the prompt, if it goes on from there.
      parallel: whether more than one call is given; otherwise the others are left out.
    """

    def __init__(
        self, dialect: Dialect, tools: Tools | None = None, *, prompt: str = "", begun: str = "", parallel: bool = True
    ):
        self._reader, self._parallel, self._calls = Reader(), parallel, 0
        self._tools = tools if tools and dialect.calls != "none" else None
        if dialect.is_harmony:
            self._steps: Iterator[Event | None] = harmony.answer(self._reader, self._tools)
            _, turn, header = prompt.rpartition(_TURN)
            if turn:
                self.push(header)
        else:
            self._steps = _answer(self._reader, dialect, self._tools, _is_open(dialect.thinking, prompt, begun))

    def push(self, text: str) -> list[Event]:
        """Takes the next piece of the answer."""
        self._reader.text += text
        return self._advance()

    def end(self) -> list[Event]:
        """Ends the answer."""
        self._reader.ended = True
        return self._advance()

    def whole(self, text: str) -> Answer:
        """Takes an answer in one piece."""
        return Answer().add(self.push(text)).add(self.end())

    def _advance(self) -> list[Event]:
        return joined(self._wanted(iter(self._steps.__next__, None)))

    def _wanted(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            self._calls += isinstance(event, Call)
            if self._parallel or self._calls < 2 or not isinstance(event, Call | Arguments | CallEnd):
                yield event


def _answer(r: Reader, dialect: Dialect, tools: Tools | None, opened: bool) -> Steps[None]:
    if dialect.thinking:
        yield from _reasoning(r, dialect.thinking, opened)
    if dialect.format and tools:
        yield from formats.content(r, dialect.format, tools)
    else:
        yield from r.until((), Content)


def _reasoning(r: Reader, marks: Thinking, opened: bool) -> Steps[None]:
    """Reasoning at the beginning of an answer; white space around it is left out."""
    yield from r.space()
    if not (yield from r.takes(marks.open)) and not opened:
        r.at = 0
        return
    yield from r.space()
    if (yield from r.until((marks.close,), Reasoning, trim=" \t\r\n")):
        yield from r.space()
    r.forget()


def _is_open(marks: Thinking | None, prompt: str, begun: str) -> bool:
    """Whether an answer goes on inside of reasoning."""
    if marks is None:
        return False
    return prompt.rstrip().endswith(marks.open.rstrip()) or begun.rfind(marks.open) > begun.rfind(marks.close)
