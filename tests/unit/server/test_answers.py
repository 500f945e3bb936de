"""What connects the engine's threads with the event loop, without an engine."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ferrum_jax.engine import Output
from ferrum_jax.server.answers import Answers, Bridge
from ferrum_jax.server.errors import ApiError, ClientGone
from ferrum_jax.server.gate import Gate


class StandIn:
    """A request whose outputs the test gives."""

    def __init__(self) -> None:
        self.state, self.finish_reason, self.logprobs, self.error = "running", None, None, ""
        self.outputs: list[Output] = []
        self.times = SimpleNamespace(last_token=0.0)
        self.callback: Any = None

    def listen(self, callback: Any) -> None:
        self.callback = callback

    def poll(self) -> list[Output]:
        found, self.outputs = self.outputs, []
        return found

    def give(self, text: str, reason: str | None = None) -> None:
        self.outputs.append(Output(text, [1]))
        self.times.last_token += 0.5
        if reason is not None:
            self.state, self.finish_reason = "finished", reason
        self.callback()


class Wire:
    """The client's end: `leave` closes it."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def answers_of(*requests: StandIn, ping: float = 60.0) -> tuple[Answers, Wire, SimpleNamespace]:
    wire, seen = Wire(), SimpleNamespace(aborted=[], ended=[], paused=[])
    bridge = Bridge(asyncio.get_running_loop())
    answers = Answers(
        requests, wire.receive, bridge, abort=seen.aborted.append, ended=seen.ended.append, paused=seen.paused.append,
        ping=ping, timeout=None,
    )  # fmt: skip
    return answers, wire, seen


def test_many_notes_wake_the_loop_once() -> None:
    async def work() -> None:
        loop, wakings, done = asyncio.get_running_loop(), [], []
        waking = SimpleNamespace(call_soon_threadsafe=lambda call: wakings.append(loop.call_soon_threadsafe(call)))
        bridge = Bridge(waking)  # type: ignore[arg-type]
        thread = threading.Thread(target=lambda: [bridge.call(lambda: done.append(1)) for _ in range(100)])
        thread.start()
        thread.join()
        await asyncio.sleep(0.01)
        bridge.call(lambda: done.append(1))
        await asyncio.sleep(0.01)
        assert (len(wakings), len(done)) == (2, 101)

    asyncio.run(work())


def test_what_arrives_together_comes_together_and_ends_once() -> None:
    async def work() -> None:
        first, second = StandIn(), StandIn()
        answers, _, seen = answers_of(first, second)
        batches = answers.batches()
        first.give("a")
        first.give("b", "stop")
        second.give("c")
        assert [(p.choice, p.text, p.finish_reason) for p in await anext(batches)] == [(0, "ab", "stop"), (1, "c", None)]
        first.callback()  # the engine may tell an end twice
        second.give("d", "length")
        assert [(p.choice, p.text, p.finish_reason) for p in await anext(batches)] == [(1, "d", "length")]
        with pytest.raises(StopAsyncIteration):
            await anext(batches)
        answers.close()
        assert (seen.ended, seen.aborted, seen.paused) == ([first, second], [], [0.5])

    asyncio.run(work())


def test_a_client_that_leaves_ends_all_that_is_open() -> None:
    async def work() -> None:
        first, second = StandIn(), StandIn()
        answers, wire, seen = answers_of(first, second)
        first.give("a", "stop")
        reader = asyncio.ensure_future(answers.collect())
        await asyncio.sleep(0.01)
        wire.left.set()
        await asyncio.sleep(0.01)
        assert seen.aborted == [second] and reader.done()
        with pytest.raises(ClientGone):
            await reader

    asyncio.run(work())


def test_a_reader_that_never_waits_notices_that_it_is_cancelled() -> None:
    """The engine always has something new, so the reader has nothing to wait for."""

    async def work() -> None:
        request = StandIn()
        answers, _, _ = answers_of(request)

        async def read() -> int:
            count = 0
            async for _ in answers.batches():
                count += 1
                if count == 1000:
                    return count
                request.outputs.append(Output("a", [1]))
                answers._ready[0] = None
            return count

        request.give("a")
        reader = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert reader.cancelled()
        answers.close()

    asyncio.run(work())


def test_the_time_is_limited_and_silence_gives_empty_batches() -> None:
    async def work() -> None:
        request = StandIn()
        answers, _, seen = answers_of(request, ping=0.0)
        batches = answers.batches()
        assert await anext(batches) == []
        answers._expire(0.05)  # what the timer calls
        with pytest.raises(ApiError, match=r"longer than 0\.05 seconds"):
            await anext(batches)
        assert seen.aborted == [request]
        answers.close()

    asyncio.run(work())


def test_an_engine_s_error_is_raised() -> None:
    async def work() -> None:
        request = StandIn()
        answers, _, _ = answers_of(request)
        request.error = "broken"
        request.give("", "error")
        with pytest.raises(ApiError, match="broken"):
            await answers.collect()
        answers.close()

    asyncio.run(work())


def test_only_a_key_is_a_key() -> None:
    gate = Gate(None, SimpleNamespace(settings=SimpleNamespace(api_keys=("one", "two"))))  # type: ignore[arg-type]
    assert [gate._knows(key) for key in (b"one", b"two", b"", b"on", b"one ", b"onetwo")] == [True, True, *[False] * 4]
