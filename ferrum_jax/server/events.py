"""Server-sent events: an answer that is sent while it is made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ferrum_jax.engine import Request
from ferrum_jax.server.answers import Answers
from ferrum_jax.server.errors import ApiError, ClientGone
from ferrum_jax.server.replies import Reply

PING = b": ping\n\n"


class Answer(Protocol):
    """How an API writes the answer to one request: whole, as a stream of bytes, and an error inside a stream."""

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]: ...

    def stream(self, answers: Answers) -> AsyncIterator[bytes]: ...

    def failed(self, error: ApiError) -> bytes: ...


def event(value: Any, name: str = "") -> bytes:
    """One event with JSON data."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(value) + b"\n\n"


async def respond(answer: Answer, answers: Answers, headers: dict[str, str], *, stream: bool) -> Response:
    """An answer when it is complete, or as a stream."""
    if stream:
        return EventStream(answer.stream(answers), answers, answer.failed, headers)
    try:
        await answers.collect()
    except ClientGone:
        return Response(status_code=499)  # for the log: the client has left
    finally:
        answers.close()
    return Reply(answer.whole(answers.requests), headers=headers)


class EventStream(Response):
    """Sends the bytes that an iterator gives, each as soon as it is there.

    The status is sent with the first of them, so an error before that has a status code of its own; a later one becomes an
    event, after which the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        answers: Answers,
        failed: Callable[[ApiError], bytes],
        headers: dict[str, str],
    ):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"} | headers)
        del self.headers["content-length"]
        self.parts, self.answers, self.failed = parts, answers, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self.parts):  # type: ignore[type-var]
                async for part in self.parts:
                    if not started:
                        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                        started = True
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except ClientGone:
            return
        except asyncio.CancelledError:
            if self.answers.expired:  # the client does not read
                return
            raise
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self.failed(error), "more_body": True})
        finally:
            self.answers.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
