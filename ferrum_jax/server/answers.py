"""From the engine's threads to the event loop.

The engine calls back when something has arrived. The callback leaves a note and wakes the loop, unless it is awake already, so
a dispatch costs the engine one wake-up, not one for each request. The loop then takes all that has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import NamedTuple

from starlette.types import Receive

from ferrum_jax.engine import Request
from ferrum_jax.server.errors import ApiError, ClientGone

_GRACE = 5.0  # seconds that a client has for reading the end of an answer that took too long


class Bridge:
    """Runs functions in an event loop for other threads, as many as there are with one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._woken = False

    def call(self, function: Callable[[], object]) -> None:
        """May be called in any thread."""
        self._calls.append(function)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False  # before the first call: a later note wakes the loop again
        while self._calls:
            self._calls.popleft()()


class Piece(NamedTuple):
    """A part of one completion: its index, new text and tokens, and with its end the reason."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[list[tuple[int, float]]] | None
    finish_reason: str | None


class Answers:
    """The completions of one HTTP request as they arrive.

    It also watches the connection: if the client leaves, or the time is over, the requests are aborted at once. `close` must be
    called in the end.

    Args:
      requests: of the engine, each one completion.
      receive: the connection.
      bridge: to the loop in which this is used.
      abort: ends a request without waiting for the engine.
      ended: is called for each completion that has ended.
      paused: is called with the seconds between tokens of a completion that arrive one after the other.
      ping: seconds after which `batches` gives an empty batch.
      timeout: seconds until the requests are aborted; None: never.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        receive: Receive,
        bridge: Bridge,
        *,
        abort: Callable[[Request], object],
        ended: Callable[[Request], object],
        paused: Callable[[float], object],
        ping: float,
        timeout: float | None,
    ):
        self.requests = requests
        self._loop, self._abort, self._ended, self._paused, self._ping = bridge.loop, abort, ended, paused, ping
        self._newest = [0.0] * len(requests)  # when tokens arrived
        self._ready: dict[int, None] = {}  # the indices of requests with something new
        self._sent = [0] * len(requests)  # tokens
        self._open = set(range(len(requests)))  # those whose end has not been seen
        self._unsent = set(range(len(requests)))  # those whose end was not given by `batches`
        self.expired = False  # the time was over
        self._waiting: asyncio.Future[None] | None = None
        self._why: Exception | None = None  # why it was ended before its end
        self._task = asyncio.current_task()
        self._watching = self._loop.create_task(self._watch(receive))
        self._timers = [] if timeout is None else [self._loop.call_later(timeout, self._expire, timeout)]
        for index, request in enumerate(requests):
            request.listen(partial(bridge.call, partial(self._arrived, index)))

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """What has arrived since the last batch, until all completions have ended. An empty batch means that nothing has for
        some time. Raises ClientGone, or ApiError if a completion has failed."""
        while self._unsent:
            if self._ready:
                await asyncio.sleep(0)  # otherwise a body that always has something to send would not notice a cancellation
            elif self._why is None:
                await self._wait()
            if self._why is not None:
                raise self._why
            ready, self._ready = self._ready, {}
            pieces = [self._piece(index) for index in ready if index in self._unsent]
            pieces = [piece for piece in pieces if piece.text or piece.token_ids or piece.finish_reason]
            if pieces or not ready:
                yield pieces

    async def collect(self) -> None:
        """Waits until all completions have ended."""
        async for _ in self.batches():
            pass

    def close(self) -> None:
        """Ends what has not ended, and the watching."""
        self._watching.cancel()
        for timer in self._timers:
            timer.cancel()
        self.end(ClientGone())

    def _piece(self, index: int) -> Piece:
        request = self.requests[index]
        reason = request.finish_reason  # before the outputs: with the end, all of them are there
        outputs = request.poll()
        text = "".join(output.text for output in outputs)
        tokens = [token for output in outputs for token in output.token_ids]
        start = self._sent[index]
        self._sent[index] = start + len(tokens)
        if reason == "error":
            raise ApiError(500, request.error)
        if reason == "abort":
            raise ApiError(503, "the server is stopping", retry_after=1)
        if reason is not None:
            self._unsent.discard(index)
        logprobs = None if request.logprobs is None else request.logprobs[start : start + len(tokens)]
        return Piece(index, text, tokens, logprobs, reason)

    async def _wait(self) -> None:
        self._waiting = self._loop.create_future()
        timer = self._loop.call_later(self._ping, self._wake)
        try:
            await self._waiting
        finally:
            timer.cancel()
            self._waiting = None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _arrived(self, index: int) -> None:
        self._ready[index] = None
        request, before = self.requests[index], self._newest[index]
        self._newest[index] = now = request.times.last_token
        if now > before > 0:
            self._paused(now - before)
        if index in self._open and request.state == "finished":
            self._open.discard(index)
            self._ended(request)
        self._wake()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(Exception):
            while (await receive())["type"] != "http.disconnect":
                pass
        self.end(ClientGone())

    def _expire(self, timeout: float) -> None:
        self.expired = True
        self.end(ApiError(408, f"the request took longer than {timeout:g} seconds"))
        if self._task is not None:  # it may wait for a client that does not read
            self._timers.append(self._loop.call_later(_GRACE, self._task.cancel))

    def end(self, why: Exception) -> None:
        """Aborts what has not ended; `batches` then raises `why`."""
        if not self._open:
            return
        self._why = self._why or why
        for index in self._open:
            self._abort(self.requests[index])
        self._wake()
