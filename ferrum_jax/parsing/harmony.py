"""The format of gpt-oss: an answer is a series of messages with channels, and calls are messages to functions."""

from __future__ import annotations

import re

from ferrum_jax.parsing.events import Arguments, Call, CallEnd, Content, Event, Reasoning
from ferrum_jax.parsing.formats import arguments
from ferrum_jax.parsing.reader import Give, Reader, Steps
from ferrum_jax.parsing.tools import Tools

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
MARKS = (CHANNEL, MESSAGE, CONSTRAIN, *_ENDS)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([\w.:/-]+)")


def answer(r: Reader, tools: Tools | None) -> Steps[None]:
    """The messages of an answer, from the header of the first one on: <|channel|>analysis<|message|>...<|end|>

    The channel "analysis" is reasoning; "final", and "commentary" without a recipient, is content.
    """
    given: list[Give] = []
    while True:
        r.forget()
        begins = yield from r.takes(CHANNEL, MESSAGE, CONSTRAIN, " to=")
        r.at, header = 0, ""
        if begins:
            header, mark = yield from r.before(MESSAGE, *_ENDS)
            if not mark:
                return
            if mark in _ENDS:
                yield Content(header)
        r.forget()
        called = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        kind: Give = Reasoning if channel and channel[1] == "analysis" else Content
        if called and tools:
            yield Call(tools.new_id(), called[1])
            yield from r.space()
            if (yield from r.takes(*_ENDS)):
                yield Arguments("{}")
                yield CallEnd(True)
                r.at = 0
            else:
                yield from arguments(r)
                yield from r.space()
        given.append(kind)
        end = yield from r.until(_ENDS, kind if called else _on_its_own(kind, given.count(kind) > 1))
        if not end:
            return
        if end != START:
            yield from r.takes(START)
        yield from r.takes("assistant")


def _on_its_own(kind: Give, further: bool) -> Give:
    """Puts a line break between one message and a further one of its kind."""
    begun = not further

    def give(text: str) -> Event:
        nonlocal begun
        begun, first = begun or bool(text), bool(text) and not begun
        return kind("\n" + text if first else text)

    return give
