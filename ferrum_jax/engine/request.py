"""A request as its user holds it: outputs as they come, in a loop or an async loop, and the completion in the end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

from ferrum_jax.completion import Completion
from ferrum_jax.engine.sequence import Extras, Sequence
from ferrum_jax.engine.watcher import Watcher
from ferrum_jax.runtime import Runtime
from ferrum_jax.sampling_params import SamplingParams


class Serving(Protocol):
    """What a request needs of its engine."""

    serving: bool

    @property
    def model(self) -> Runtime: ...

    def step(self) -> bool: ...

    def _poll(self, request: Request, wake: Callable[[], object]) -> tuple[Output | None, bool]: ...

    def _unpoll(self, request: Request, wake: Callable[[], object]) -> None: ...

    def _next_output(self, request: Request) -> Output | None: ...

    def _wait(self, request: Request) -> None: ...

    def _fork(self, request: Request, params: SamplingParams) -> Request: ...


class Output(NamedTuple):
    """What a dispatch brought: text that is safe to show, and token ids. Either may be empty."""

    text: str
    token_ids: list[int]


class Request:
    """Made by `Engine.submit`. `id`: a number of its own; `params`: its parameters; `adapter`: the name of its adapter or
    None; `choices`: with n > 1 all requests that were made of it, itself first; `error`: what went wrong, where
    finish_reason is "error".

    Iterating gives each `Output` once and ends with the request; where no background loop runs, it drives the engine.
    """

    def __init__(
        self,
        engine: Serving,
        sequence: Sequence,
        params: SamplingParams,
        seed: int,
        extras: Extras,
        adapter: str | None = None,
    ):
        self.id, self.adapter = sequence.number, adapter
        self.params, self.choices, self.error = params, [self], ""
        self.prompt_token_ids = sequence.tokens[: sequence.prompt_length]
        self.prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._engine, self._sequence, self._seed, self._extras = engine, sequence, seed, extras
        self._watcher = Watcher(engine.model.tokenizer, params)
        self._outputs: deque[Output] = deque()
        self._has_nan = False  # among the log-probabilities of its prompt
        self._cause: Exception | None = None  # what ended it, where that was an exception
        self._wake: list[Callable[[], object]] = []  # of async loops that wait

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
    def token_ids(self) -> list[int]:
        """The output so far."""
        return self._watcher.token_ids

    @property
    def text(self) -> str:
        """The text so far that is safe to show."""
        return self._watcher.text

    @property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        return self._watcher.logprobs

    def __iter__(self) -> Iterator[Output]:
        while (output := self._engine._next_output(self)) is not None:
            yield output

    async def __aiter__(self) -> AsyncIterator[Output]:
        loop = asyncio.get_running_loop()
        while True:
            ready = asyncio.Event()
            wake = partial(loop.call_soon_threadsafe, ready.set)
            output, finished = self._engine._poll(self, wake)
            if output is not None:
                yield output
            elif finished:
                return
            elif self._engine.serving:
                try:
                    await ready.wait()
                finally:
                    self._engine._unpoll(self, wake)
            else:
                await asyncio.to_thread(self._engine.step)

    def result(self) -> Completion:
        """Waits for the end. The completion, with finish_reason "abort" or "error" too."""
        self._engine._wait(self)
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
        """A request that goes on from what there is by now, prompt and output, as its prompt. It shares the pages, so
        nothing is computed again; `params`: this request's, where they are not given."""
        return self._engine._fork(self, params or self.params)
