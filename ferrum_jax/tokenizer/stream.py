"""Text while it is generated: tokens to whole characters, and the search for stop strings across pieces.

Both hold back what could still change its meaning: an unfinished character, or the beginning of a stop string.
"""

import codecs
from collections.abc import Container, Iterable, Sequence
from typing import Protocol


class Pieces(Protocol):
    """The part of a tokenizer that `TextStream` uses."""

    @property
    def adds_space_prefix(self) -> bool: ...

    def is_control(self, token: int) -> bool: ...

    def token_bytes(self, token: int) -> bytes: ...


class TextStream:
    """Detokenizes step by step; the pieces together are `Tokenizer.decode` of all ids.

    A character spread over several tokens is returned with its last byte; invalid bytes are returned as U+FFFD with the token
    that shows that they are invalid. Control tokens add nothing (their names if `skip_special` is False). The space that a
    SentencePiece vocabulary puts before a text is dropped from the first token with text. `shown`: control tokens that add
    their names in any case.

    `before`: the ids that the text continues, such as a prompt. Their text and the new pieces together are the decoding of all
    ids: a first space is kept if there was text before, and a character that begins in them is completed here. Ids outside the
    vocabulary have no text.
    """

    def __init__(
        self, tokenizer: Pieces, skip_special: bool = True, before: Iterable[int] = (), shown: Container[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special, self._shown = skip_special, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.adds_space_prefix
        tail = b""
        for token in reversed(list(before)):
            try:
                silent, piece = tokenizer.is_control(token), tokenizer.token_bytes(token)
            except ValueError:
                continue
            if not silent:
                self._drop_space = False
            if not (silent and skip_special):
                tail = piece + tail
            if len(tail) >= 3 and not self._drop_space:  # no unfinished character is longer
                break
        self._decoder.decode(tail[-3:])

    def push(self, token: int) -> str:
        """The characters that this token completes. Raises ValueError for an id outside the vocabulary."""
        if self._tokenizer.is_control(token):
            silent = self._skip_special and token not in self._shown
            return "" if silent else self._decoder.decode(self._tokenizer.token_bytes(token))
        piece = self._tokenizer.token_bytes(token)
        if self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Ends the text: returns U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Finds the first of several stop strings in a text that arrives in pieces.

    Text is returned only when it can no longer be part of a stop string; the stop string itself is never returned. If several
    occur, the one that is complete first counts (then the longest), so the sizes of the pieces do not matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: strings to stop at. Raises ValueError for an empty one. `found`: the one that was found."""
        if not all(stops):
            raise ValueError("stop: a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Takes a piece and returns (text that is safe to show, whether a stop string was found)."""
        if self.stopped:
            return "", True
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at = min(found)
            out, self.found = self._held[:at], self._held[at:end]
            self._held, self.stopped = "", True
            return out, True
        keep = self._first_partial()
        out, self._held = self._held[:keep], self._held[keep:]
        return out, False

    def _first_partial(self) -> int:
        """The start of the longest tail that could begin a stop string."""
        held = self._held
        longest = max((len(stop) for stop in self._stops), default=0)
        for at in range(max(0, len(held) - longest + 1), len(held)):
            if any(stop.startswith(held[at:]) for stop in self._stops):
                return at
        return len(held)

    def flush(self) -> str:
        """The text that was held back, for the end of a text without a stop string."""
        out, self._held = self._held, ""
        return out
