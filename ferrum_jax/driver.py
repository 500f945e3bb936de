"""Running a batch of requests from the host: arrays of few shapes, steps, and text as it comes.

A program is compiled for each shape, so shapes come from short lists. `Driver` steps a batch a few tokens a dispatch and
reads each dispatch's results while the next one runs; `Watcher` turns one row's tokens into text and sees its end;
`stream` is both for a single prompt.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from ferrum_jax import functional
from ferrum_jax.runtime import PAGE, Runtime
from ferrum_jax.sampling import Sampling, SamplingParams
from ferrum_jax.tokenizer import StopMatcher, TextStream, Tokenizer

_STEPS = 16  # tokens a dispatch at most
_DISPATCH_SECONDS = 0.05  # what a dispatch aims at


class Inputs:
    """Prompts and parameters of a batch, each row's max_tokens within the context.

    `longest_prompt`, `max_tokens`: the most that a row has; `longest`: of prompt and output together; `adapters`: int32
    [rows], None where no row has one.
    """

    def __init__(self, model: Runtime, prompts: list[list[int]], params: list[SamplingParams], adapters: Sequence[int] = ()):
        room = [model.max_seq_len - len(ids) for ids in prompts]
        limited = [dataclasses.replace(p, max_tokens=min(p.max_tokens, r)) for p, r in zip(params, room, strict=True)]
        self.model, self.prompts, self.logprobs = model, prompts, params[0].logprobs
        self.longest_prompt = max(map(len, prompts))
        self.max_tokens = max(p.max_tokens for p in limited)
        self.longest = max(len(ids) + p.max_tokens for ids, p in zip(prompts, limited, strict=True))
        self.tokens = sum(map(len, prompts))
        self.rows = power_of_two(len(prompts))
        self.adapters: np.ndarray | None = None
        if any(adapter >= 0 for adapter in adapters):
            self.adapters = np.full(self.rows, -1, np.int32)
            self.adapters[: len(adapters)] = adapters
        self.sampling = Sampling.from_params(
            limited,
            eos_ids=sorted(model.tokenizer.eos_ids),
            vocab_limit=min(model.tokenizer.vocab_size, model.config.vocab_size),
            pad_to=self.rows,
            default_seeds=[secrets.randbits(32) for _ in limited],
        )

    def arguments(self, width: int, capacity: int) -> tuple:
        """The arguments of `functional.generate` and `functional.start`: parameters, a cache of `capacity` tokens a row,
        prompts padded to `width`, lengths, sampling, key and adapters."""
        cache = self.model.new_cache(self.rows * -(-capacity // PAGE))
        return self.model.params, cache, *padded(self.prompts, width), self.sampling, np.zeros(2, np.uint32), self.adapters


class Driver:
    """Steps a batch and gives `Sampled` dispatch by dispatch, each read on the host while the next one runs.

    A single row's capacity grows by fours and prefill chunks have two sizes, so that a conversation meets few programs.
    """

    def __init__(self, model: Runtime, prompts: list[list[int]], params: list[SamplingParams], adapters: Sequence[int] = ()):
        self.model, self.inputs = model, Inputs(model, prompts, params, adapters)
        self.capacity = bucket(self.inputs.longest)
        if len(prompts) == 1:
            self.capacity = 256
            while self.capacity < self.inputs.longest:
                self.capacity *= 4
        self._cancelled = np.zeros(self.inputs.rows, bool)

    def cancel(self, rows: Sequence[bool]) -> None:
        """Marks rows (True) as finished; they decode no further."""
        padding = [False] * (self.inputs.rows - len(rows))
        self._cancelled = self._cancelled | np.asarray([*rows, *padding])

    def __iter__(self) -> Iterator[functional.Sampled]:
        model, programs = self.model, self.model.programs
        static = {"config": model.config, "logprobs": self.inputs.logprobs}
        arguments = self.inputs.arguments(self.capacity, self.capacity)
        chunk = 64 if self.inputs.tokens <= 256 else functional.CHUNK
        start = programs.get(functional.start, *arguments, donate=(1,), chunk=chunk, **static)
        begin = time.perf_counter()
        cache, state, sampled = start(*arguments)
        pending = programs.fetch(sampled)
        model.count("prefill", self.inputs.tokens, time.perf_counter() - begin)
        model.count("decode", made(pending), 0.0)
        yield pending  # before the program of the following tokens is compiled
        params, *_, sampling, key, adapters = arguments
        limit, pending, at_exit = 1, None, sys.is_finalizing
        while True:
            current = (params, cache, state, sampling, key, self._cancelled, np.int32(limit), adapters)
            advance = programs.get(_advance, *current, donate=(1, 2), steps=_STEPS, **static)
            begin = time.perf_counter()
            cache, state, sampled = advance(*current)
            try:
                if pending is not None:
                    yield pending  # used by the caller while the device works
            finally:  # nothing is left running when the caller goes away
                if not at_exit():
                    pending = programs.fetch(sampled)
            taken = time.perf_counter() - begin
            steps = int((pending.tokens >= 0).sum(axis=1).max())
            if not steps:
                return
            model.count("decode", made(pending), taken)
            limit = int(np.clip(_DISPATCH_SECONDS / (taken / steps), 1, _STEPS))


def made(sampled: functional.Sampled) -> int:
    """How many tokens a dispatch made."""
    return int((sampled.tokens >= 0).sum())


def _advance(params, cache, state, sampling, key, cancelled, limit, adapters, *, config, steps, logprobs):
    """functional.advance without the rows that the host has ended."""
    state = state._replace(done=state.done | cancelled)
    return functional.advance(
        params, cache, state, sampling, key, limit, adapters, config=config, steps=steps, logprobs=logprobs
    )


class Watcher:
    """Follows one row: tokens in, text out, until an end token, a stop string or the limit."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.token_ids: list[int] = []
        self.logprobs: list[list[tuple[int, float]]] | None = None if params.logprobs is None else []
        self.text = ""
        self.finish_reason: str | None = None
        self._ends: frozenset[int] = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self._decoder, self._stops = TextStream(tokenizer), StopMatcher(params.stop)
        self._has_stops, self._min_tokens = bool(params.stop), params.min_tokens

    def push(self, sampled: functional.Sampled, row: int) -> tuple[str, list[int]]:
        """Takes what a dispatch sampled for the row: the new text that is safe to show, and the new token ids."""
        tokens = [token for token in sampled.tokens[row].tolist() if token >= 0]
        logprobs = [] if self.logprobs is None else listed(sampled.ids[row], sampled.logprobs[row], len(tokens))
        return self.take(tokens, logprobs)

    def take(self, tokens: list[int], logprobs: list[list[tuple[int, float]]]) -> tuple[str, list[int]]:
        """Takes the row's next tokens, and their log-probabilities where they are wanted: the new text that is safe to
        show, and those of the tokens that still belong to the row."""
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
        """The text held back until now; call when the row has ended."""
        stopped_by_text = False
        piece = ""
        if self.finish_reason is None or (self.token_ids and self.token_ids[-1] in self._ends):
            piece, stopped_by_text = self._stops.push(self._decoder.flush())
            piece += "" if stopped_by_text else self._stops.flush()
        self.finish_reason = self.finish_reason or ("stop" if stopped_by_text else "length")
        self.text += piece
        return piece


def listed(ids: Any, logprobs: Any, count: int) -> list[list[tuple[int, float]]]:
    """(id, logprob) pairs of the first `count` of ids and logprobs [N, k]."""
    return [list(zip(*row, strict=True)) for row in zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True)]


class Stream:
    """Iterator of (text piece, token ids). After its end: `finish_reason`, `token_ids`, `text`, `logprobs`."""

    def __init__(self, prompt: list[int], watcher: Watcher, pieces: Generator[tuple[str, list[int]], None, None]):
        self.prompt_token_ids, self._watcher, self._pieces = prompt, watcher, pieces

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[str, list[int]]:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating; what was generated so far stays readable."""
        self._pieces.close()

    @property
    def finish_reason(self) -> str | None:
        return self._watcher.finish_reason

    @property
    def token_ids(self) -> list[int]:
        return self._watcher.token_ids

    @property
    def text(self) -> str:
        return self._watcher.text

    @property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        return self._watcher.logprobs


def stream(model: Runtime, prompt: list[int], params: SamplingParams, adapter: int = -1) -> Stream:
    """A `Stream` that steps the model for one prompt."""
    watcher = Watcher(model.tokenizer, params)

    def pieces() -> Generator[tuple[str, list[int]], None, None]:
        for sampled in Driver(model, [prompt], [params], [adapter]):
            piece, ids = watcher.push(sampled, 0)
            if ids:
                yield piece, ids
            if watcher.finish_reason is not None:
                break
        rest = watcher.flush()
        if rest:
            yield rest, []

    return Stream(prompt, watcher, pieces())


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ...: at most half as much again as asked for."""
    power = 1 << max(4, (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 16 else power


def power_of_two(count: int) -> int:
    """The next power of two: how many rows a batch is padded to."""
    return 1 << (count - 1).bit_length()


def padded(prompts: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, width], right-padded with 0, and lengths int32 [B]; B is a power of two, rows of padding have length 0."""
    tokens = np.zeros((power_of_two(len(prompts)), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths
