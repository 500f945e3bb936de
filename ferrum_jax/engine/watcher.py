"""Follows one sequence: takes tokens and returns the text after its prompt, until an end token, a stop string or the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.tokenizer import StopMatcher, TextStream, Tokenizer


class Watcher:
    """`text`: the text so far that is safe to show; `finish_reason`: None until the end is found or `flush` was called."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int]):
        self.token_ids: list[int] = []
        self.logprobs: list[list[tuple[int, float]]] | None = None if params.logprobs is None else []
        self.text = ""
        self.finish_reason: str | None = None
        self._ends: frozenset[int] = frozenset() if params.ignore_eos else tokenizer.eos_ids
        special = params.special_tokens
        shown = frozenset(() if isinstance(special, bool) else special)
        self._decoder = TextStream(tokenizer, special is not True, prompt, shown)
        self._stops = StopMatcher(params.stop)
        self._has_stops, self._min_tokens = bool(params.stop), params.min_tokens

    @property
    def at_end_token(self) -> bool:
        """Whether the newest token is an end token."""
        return bool(self.token_ids) and self.token_ids[-1] in self._ends

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    def take(self, tokens: list[int], logprobs: list[list[tuple[int, float]]]) -> tuple[str, list[int]]:
        """Takes the row's next tokens, and their log-probabilities if requested. Returns the new text that is safe to show, and
        those of the tokens that still belong to the row."""
        before = len(self.token_ids)
        pieces = []
        for i, token in enumerate(tokens):
            if self.finish_reason is not None:
                break
            self.token_ids.append(token)
            if self.logprobs is not None:
                self.logprobs.append(logprobs[i])
            if token in self._ends:
                self.finish_reason = "stop"
                break
            text = self._decoder.push(token)
            if self._has_stops and len(self.token_ids) > self._min_tokens:
                text, stopped = self._stops.push(text)
                if stopped:
                    self.finish_reason = "stop"
            pieces.append(text)
        piece = "".join(pieces)
        self.text += piece
        return piece, self.token_ids[before:]

    def flush(self) -> str:
        """The text that was held back; call it when the row has ended."""
        stopped_by_text = False
        piece = ""
        if self.finish_reason is None or self.at_end_token:
            piece, stopped_by_text = self._stops.push(self._decoder.flush())
            piece += "" if stopped_by_text else self._stops.flush()
        self.finish_reason = self.finish_reason or ("stop" if stopped_by_text else "length")
        self.text += piece
        return piece


def listed(ids: Any, logprobs: Any, count: int) -> list[list[tuple[int, float]]]:
    """(id, logprob) pairs of the first `count` of ids and logprobs [N, k]."""
    return [list(zip(*row, strict=True)) for row in zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True)]
