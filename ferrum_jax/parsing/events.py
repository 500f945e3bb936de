"""What an answer consists of, as it arrives: reasoning, content, and calls of functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple


class Reasoning(NamedTuple):
    """What the model thinks before it answers."""

    text: str


class Content(NamedTuple):
    """What the model says to the user."""

    text: str


class Call(NamedTuple):
    """A call begins. `id`: made here, unless the format has ids."""

    id: str
    name: str


class Arguments(NamedTuple):
    """A further part of the arguments of the call that has begun: the text of a JSON object."""

    text: str


class CallEnd(NamedTuple):
    """The call is over. `complete`: whether its arguments are a whole JSON object; they are not where the text has ended or
    what follows cannot be JSON."""

    complete: bool


Event = Reasoning | Content | Call | Arguments | CallEnd


@dataclasses.dataclass
class Called:
    """A call of a function, `arguments` as the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclasses.dataclass
class Answer:
    """What events add up to."""

    reasoning: str = ""
    content: str = ""
    calls: list[Called] = dataclasses.field(default_factory=list)

    def add(self, events: Iterable[Event]) -> Answer:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case Call(id, name):
                    self.calls.append(Called(id, name))
                case Arguments(text):
                    self.calls[-1].arguments += text
                case CallEnd(complete):
                    self.calls[-1].complete = complete
        return self


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighboring texts of one kind as one, and without empty ones."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Reasoning | Content | Arguments):
            if not event.text:
                continue
            if found and type(found[-1]) is type(event):
                found[-1] = type(event)(found[-1].text + event.text)  # type: ignore[union-attr]
                continue
        found.append(event)
    return found
