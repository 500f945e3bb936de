"""What the Responses API keeps: answers with the conversations that led to them, the newest ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

_MOST = 10_000  # answers
_MOST_TEXT = 64 << 20  # characters of all conversations


class Kept(NamedTuple):
    """`response`: as it was sent. `messages`: the conversation with the answer at its end."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]

    @property
    def size(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


class Store:
    """In memory. Used in the event loop only."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._size = 0

    def get(self, id: str) -> Kept | None:
        return self._kept.get(id)

    def put(self, kept: Kept) -> None:
        """Keeps an answer; the oldest ones make room."""
        self._kept[kept.response["id"]] = kept
        self._size += kept.size
        while len(self._kept) > _MOST or (self._size > _MOST_TEXT and len(self._kept) > 1):
            self.remove(next(iter(self._kept)))

    def remove(self, id: str) -> bool:
        """Whether it was there."""
        kept = self._kept.pop(id, None)
        self._size -= kept.size if kept is not None else 0
        return kept is not None
