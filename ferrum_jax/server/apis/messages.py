"""Anthropic's API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.server.answers import Answers
from ferrum_jax.server.bodies import Body, SamplingBody, StopTexts, TextFormat, ignored_header
from ferrum_jax.server.conversation import encode, text_of
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.replies import Reply, anthropic_error
from ferrum_jax.server.service import Service, refusals, service_of

_NEUTRAL: dict[str, list[Any]] = {
    "tools": [[]],
    "tool_choice": [{"type": "none"}],
    "thinking": [{"type": "disabled"}],
    "mcp_servers": [[]],
    "container": [],
    "context_management": [],
}


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountBody(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = _NEUTRAL

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None


class OutputConfig(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = {"effort": []}

    format: TextFormat | None = None


class MessagesBody(SamplingBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | _NEUTRAL

    messages: list[Message] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    max_tokens: int
    n: Literal[1] | None = None
    stop_sequences: StopTexts | None = None
    output_config: OutputConfig | None = None
    output_format: TextFormat | None = None  # its older name

    @property
    def formats(self) -> dict[str, Any]:
        config = self.output_config and self.output_config.format
        return super().formats | {"output_config.format": config, "output_format": self.output_format}


async def messages(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, MessagesBody)
    adapter = service.adapter(body.model)
    talk = _conversation(body)
    stops = {} if body.stop_sequences is None else {"stop": body.stop_sequences}

    def make() -> list[Request]:
        ids = encode(service, talk, {}, goes_on=body.messages[-1].role == "assistant")
        return service.engine.submit(ids, body.sampling(**stops, **structured(service, body.formats)), adapter).choices

    answers = await service.submit(request, make, 1, "messages")
    answer = _MessageAnswer(service, body, answers.requests[0])
    return await respond(answer, answers, ignored_header(body.ignored()), stream=bool(body.stream))


async def count_tokens(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, CountBody)
    service.adapter(body.model)
    talk = _conversation(body)
    with refusals("messages"):
        ids = await service.run(lambda: encode(service, talk, {}, goes_on=body.messages[-1].role == "assistant"))
    return Reply({"input_tokens": len(ids)}, headers=ignored_header(body.ignored()))


def _conversation(body: MessagesBody | CountBody) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Messages of one side that follow each other are one."""
    system = [] if not body.system else [{"role": "system", "content": text_of(body.system, "system")}]
    talk: list[dict[str, Any]] = []
    for i, message in enumerate(body.messages):
        text = text_of(message.content, f"messages.{i}.content")
        if talk and talk[-1]["role"] == message.role:
            talk[-1]["content"] += f"\n\n{text}"
        else:
            talk.append({"role": message.role, "content": text})
    return system + talk


class _MessageAnswer:
    def __init__(self, service: Service, body: MessagesBody, request: Request):
        self.request = request
        self.head = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": body.model or service.settings.name,
        }

    def usage(self) -> dict[str, int]:
        cached = self.request.cached_tokens
        return {
            "input_tokens": len(self.request.prompt_token_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": len(self.request.token_ids),
        }

    def end(self) -> dict[str, Any]:
        stop = self.request.stop_string
        reason = "stop_sequence" if stop else "max_tokens" if self.request.finish_reason == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        content = [{"type": "text", "text": self.request.text}]
        return self.head | {"content": content} | self.end() | {"usage": self.usage()}

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        begun = False
        async for pieces in answers.batches():
            parts: list[dict[str, Any]] = []
            if pieces and not begun:
                begun = True
                empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self.usage()}
                parts.append({"type": "message_start", "message": self.head | empty})
                parts.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
            for piece in pieces:
                if piece.text:
                    delta = {"type": "text_delta", "text": piece.text}
                    parts.append({"type": "content_block_delta", "index": 0, "delta": delta})
            yield b"".join(event(part, part["type"]) for part in parts) or PING
        last: list[dict[str, Any]] = [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": self.end(), "usage": self.usage()},
            {"type": "message_stop"},
        ]
        yield b"".join(event(part, part["type"]) for part in last)

    def failed(self, error: ApiError) -> bytes:
        return event(anthropic_error(error), "error")
