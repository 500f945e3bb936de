"""A request as its user sees it: outputs as they arrive, in a loop or an async loop, and the completion at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from ferrum_jax.completion import Completion
from ferrum_jax.engine.sequence import Extras, Sequence
from ferrum_jax.engine.snapshot import Saved
from ferrum_jax.engine.watcher import Watcher
from ferrum_jax.engine.worker import Job
from ferrum_jax.errors import ModelFileError
from ferrum_jax.runtime import Runtime
from ferrum_jax.sampling_params import SamplingParams


class Serving(Protocol):
    """The part of the engine that a request uses."""

    serving: bool

    @property
    def model(self) -> Runtime: ...

    def step(self) -> bool: ...

    def _step_soon(self, then: Callable[[], object]) -> Job: ...

    def _fork(self, request: Request, params: SamplingParams) -> Request: ...


class Output(NamedTuple):
    """The output of a dispatch: text that is safe to show, and token ids. Either may be empty."""

    text: str
    token_ids: list[int]


@dataclass
class Times:
    """When something happened to a request, in seconds of `time.perf_counter`; 0.0 if it has not.

    Attributes:
      arrived: it was submitted.
      admitted: it got a place among the running requests for the first time.
      first_token: its first token arrived.
      last_token: its newest tokens arrived.
    """

    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def took_tokens(self, now: float) -> None:
        self.first_token, self.last_token = self.first_token or now, now


class Request:
    """Made by `Engine.submit`. Iterating, also asynchronously, gives each `Output` once and ends with the request; if no
    background loop runs, it drives the engine.

    Attributes:
      id (int): a number within the engine.
      params (SamplingParams): its parameters.
      adapter (str | None): the name of its adapter.
      choices (list[Request]): with n > 1 all requests made from it, itself first.
      error (str): what went wrong, if finish_reason is "error".
      prompt_token_ids (list[int]): the tokens of the prompt.
      prompt_logprobs (list | None): as of `Completion`, as far as they are known.
      times (Times): when it arrived, was admitted, and got its tokens.
    """

    def __init__(
        self,
        engine: Serving,
        sequence: Sequence,
        params: SamplingParams,
        seed: int,
        extras: Extras,
        adapter: str | None = None,
        begun: int = 0,
    ):
        """begun: the last tokens of the prompt that belong to the output's grammar."""
        self.id, self.adapter = sequence.number, adapter
        self.params, self.choices, self.error = params, [self], ""
        self.prompt_token_ids = sequence.tokens[: sequence.prompt_length]
        self.prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._engine, self._sequence, self._seed, self._extras, self._begun = engine, sequence, seed, extras, begun
        self._watcher = Watcher(engine.model.tokenizer, params, self.prompt_token_ids)
        self.times = Times()
        self._outputs: deque[Output] = deque()
        self._listener: Callable[[], object] | None = None
        self._has_nan = False  # among the log-probabilities of its prompt
        self._cause: Exception | None = None  # the exception that ended it, if any
        self._wake: deque[Callable[[], object]] = deque()  # callbacks of waiting readers

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.state}, {len(self.token_ids)} tokens>"

    @property
    def state(self) -> str:
        """ "waiting", "running" or "finished"."""
        return self._sequence.state

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "abort" or "error" once the request is finished."""
        return self._watcher.finish_reason if self.state == "finished" else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended it, if one has."""
        return self._watcher.stop_string

    @property
    def token_ids(self) -> list[int]:
        """The output so far."""
        return self._watcher.token_ids

    @property
    def text(self) -> str:
        """The text so far that is safe to show."""
        return self._watcher.text

    @property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        """As of `Completion`, for the output so far."""
        return self._watcher.logprobs

    @property
    def cached_tokens(self) -> int:
        """The tokens of the prompt that were not computed, because the prefix cache or another request had them."""
        return max(0, self._sequence.cached)

    def listen(self, callback: Callable[[], object]) -> None:
        """Calls back whenever something has arrived, and when the request has ended; at once if that is so already. A program
        with its own loop, such as a server, then takes the outputs with `poll`.

        Args:
          callback: is called in a thread of the engine, which it must not hold up. It replaces an earlier one.
        """
        self._listener = callback
        if self._outputs or self.state == "finished":
            callback()

    def poll(self) -> list[Output]:
        """The outputs that have arrived and were not given yet, without waiting."""
        return [self._outputs.popleft() for _ in range(len(self._outputs))]

    def __iter__(self) -> Iterator[Output]:
        while self._until(lambda: self._outputs or self.state == "finished"):
            # From the deque to the loop's body in C code: no interrupt can come in between, so no output is lost.
            try:
                yield from iter(self._outputs.popleft, None)
            except IndexError:
                if self._is_over():
                    return

    async def __aiter__(self) -> AsyncIterator[Output]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                for output in iter(self._outputs.popleft, None):
                    yield output
            except IndexError:
                if self._is_over():
                    return
            ready = asyncio.Event()
            wake = partial(loop.call_soon_threadsafe, ready.set)
            if not self._engine.serving:
                step = self._engine._step_soon(wake)
                await ready.wait()
                step.result()
                continue
            self._wake.append(wake)
            try:
                if not self._outputs and self.state != "finished" and self._engine.serving:
                    await ready.wait()
            finally:
                with contextlib.suppress(ValueError):
                    self._wake.remove(wake)

    def result(self) -> Completion:
        """Waits for the end and returns the completion, also with finish_reason "abort" or "error"."""
        self._until(lambda: self.state == "finished")
        watcher = self._watcher
        return Completion(
            watcher.text,
            watcher.token_ids,
            watcher.finish_reason or "length",
            watcher.logprobs,
            self.prompt_token_ids,
            self.prompt_logprobs,
            self.error,
        )

    def results(self) -> list[Completion]:
        """`result` of every choice."""
        return [choice.result() for choice in self.choices]

    def fork(self, params: SamplingParams | None = None) -> Request:
        """A request whose prompt is the current text of this one, prompt and output. It shares the pages, so nothing is
        computed again.

        Args:
          params: how to continue; None: as this request.

        Raises:
          ValueError: as for `Engine.submit`.
        """
        return self._engine._fork(self, self.params if params is None else params)

    # Inside

    def _is_over(self) -> bool:
        return self.state == "finished" and not self._outputs

    def _until(self, reached: Callable[[], object]) -> bool:
        """True once a condition holds; if no background loop runs, this drives the engine."""
        while not reached():
            if not self._engine.serving:
                self._engine.step()
                continue
            woken: SimpleQueue[None] = SimpleQueue()
            self._wake.append(partial(woken.put, None))
            if not reached() and self._engine.serving:  # otherwise nothing might wake this reader
                woken.get()
        return True

    def _wake_readers(self) -> None:
        """Called after something new has arrived; a reader registers before it looks, so it misses nothing."""
        for _ in range(len(self._wake)):
            with contextlib.suppress(IndexError, RuntimeError):  # the reader has left, or its event loop is closed
                self._wake.popleft()()
        if self._listener is not None:
            with contextlib.suppress(RuntimeError):
                self._listener()

    def _resume(self, saved: Saved, path: Path) -> None:
        """Restores the output in a snapshot. ModelFileError if it continues after its end."""
        watcher = self._watcher
        self.prompt_logprobs = saved.prompt_logprobs
        watcher.take(saved.output, saved.logprobs or [])
        ended = watcher.finish_reason
        if len(watcher.token_ids) != len(saved.output) or (ended is not None and saved.finish_reason is None):
            raise ModelFileError(f"{path}: the output of the snapshot goes on after its end")
        if saved.finish_reason is not None:
            watcher.flush()
            watcher.finish_reason, self._sequence.state = saved.finish_reason, "finished"
