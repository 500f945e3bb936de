"""Anthropic's API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field
from pydantic_core import from_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.parsing import Arguments, Call, CallEnd, Content, Event, Reasoning
from ferrum_jax.server.answers import Answers
from ferrum_jax.server.bodies import Body, SamplingBody, StopTexts, TextFormat, ignored_header
from ferrum_jax.server.calling import Calling, calling
from ferrum_jax.server.conversation import Turn, text_of
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.replies import Reply, anthropic_error
from ferrum_jax.server.service import Service, refusals, service_of

_NEUTRAL: dict[str, list[Any]] = {
    "mcp_servers": [[]],
    "container": [],
    "context_management": [],
}


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Tool(Body):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"]


class Conversation(Body):
    """What becomes the prompt."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def turn(self, service: Service) -> Turn:
        service.adapter(self.model)
        template = {} if self.thinking is None else service.thinking(self.thinking.type != "disabled", "thinking")
        goes_on = self.messages[-1].role == "assistant"
        return Turn(service, _talk(self), template, self._calling(), goes_on=goes_on)

    def _calling(self) -> Calling:
        functions = []
        for i, tool in enumerate(self.tools or ()):
            if tool.type not in (None, "custom"):
                message = f"tools.{i}: the type {tool.type!r:.40} is not supported here; only functions are"
                raise ApiError(400, message, param=f"tools.{i}")
            functions.append(tool.model_dump(exclude_none=True) | {"parameters": tool.input_schema})
        choice = self.tool_choice or ToolChoice(type="auto")
        parallel = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            return calling(functions, [choice.name or ""], forced=True, parallel=parallel)
        return calling(functions, "required" if choice.type == "any" else choice.type, parallel=parallel)


class OutputConfig(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = {"effort": []}

    format: TextFormat | None = None


class CountBody(Conversation):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = _NEUTRAL


class MessagesBody(SamplingBody, Conversation):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | _NEUTRAL

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
    turn = body.turn(service)
    stops = {} if body.stop_sequences is None else {"stop": body.stop_sequences}

    def make() -> list[Request]:
        return turn.submit(body, body.max_tokens, **stops, **structured(service, body.formats))

    answers = await service.submit(request, make, 1, "messages")
    answer = _MessageAnswer(service, body, turn, answers.requests[0])
    return await respond(answer, answers, ignored_header(body.ignored()), stream=bool(body.stream))


async def count_tokens(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, CountBody)
    turn = body.turn(service)
    with refusals("messages"):
        ids = await service.run(turn.encode)
    return Reply({"input_tokens": len(ids)}, headers=ignored_header(body.ignored()))


def _talk(body: Conversation) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Those of one side that follow each other are one, except results of tools."""
    system = [] if not body.system else [{"role": "system", "content": text_of(body.system, "system")}]
    talk: list[dict[str, Any]] = []
    for i, message in enumerate(body.messages):
        for part in _parts(message, f"messages.{i}.content"):
            last = talk[-1] if talk else {"role": ""}
            if last["role"] != part["role"] or part["role"] == "tool":
                talk.append({"content": ""} | part)
                continue
            if text := part.get("content"):
                last["content"] += f"\n\n{text}" if last["content"] else text
            if "tool_calls" in part:
                last["tool_calls"] = last.get("tool_calls", []) + part["tool_calls"]
            if "reasoning_content" in part:
                last["reasoning_content"] = last.get("reasoning_content", "") + part["reasoning_content"]
    return system + talk


def _parts(message: Message, field: str) -> list[dict[str, Any]]:
    """The messages that one of Anthropic's stands for: results of tools, and what is said."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    said: dict[str, Any] = {"role": message.role, "content": "", "tool_calls": [], "reasoning_content": ""}
    for i, block in enumerate(message.content):
        kind, place = block.get("type"), f"{field}.{i}"
        if kind == "tool_result" and message.role == "user":
            content = text_of(block.get("content") or "", f"{place}.content")
            results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": content})
        elif kind == "tool_use" and message.role == "assistant":
            given = {"name": _text(block, "name", place), "arguments": block.get("input")}
            said["tool_calls"].append({"id": _text(block, "id", place), "type": "function", "function": given})
        elif kind == "thinking" and message.role == "assistant":
            said["reasoning_content"] += _text(block, "thinking", place)
        elif kind == "text":
            said["content"] += _text(block, "text", place)
        elif kind != "redacted_thinking":
            raise ApiError(400, f"{place}: {kind!r:.40} is not supported here", param=place)
    said = {key: value for key, value in said.items() if value or key == "role"}
    return results + ([said] if len(said) > 1 or not results else [])


def _text(block: dict[str, Any], key: str, field: str) -> str:
    if not isinstance(block.get(key), str):
        raise ApiError(400, f"{field}.{key}: must be a text", param=f"{field}.{key}")
    return block[key]


class _MessageAnswer:
    def __init__(self, service: Service, body: MessagesBody, turn: Turn, request: Request):
        self.request, self.parser = request, turn.parser()
        self.blocks: list[dict[str, Any]] = []
        self.open = ""  # the kind of the block that has begun
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
        stop, calls = self.request.stop_string, any(block["type"] == "tool_use" for block in self.blocks)
        reason = "max_tokens" if self.request.finish_reason == "length" else "tool_use" if calls else "end_turn"
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        self.take(self.request.text, last=True)
        for block in self.blocks:
            if isinstance(written := block.get("input"), str):
                block["input"] = orjson.Fragment(written)
        return self.head | {"content": self.blocks} | self.end() | {"usage": self.usage()}

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        begun = False
        async for pieces in answers.batches():
            parts: list[dict[str, Any]] = []
            if pieces and not begun:
                begun = True
                empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self.usage()}
                parts.append({"type": "message_start", "message": self.head | empty})
            for piece in pieces:
                parts += self.take(piece.text, last=piece.finish_reason is not None)
            yield b"".join(event(part, part["type"]) for part in parts) or PING
        last: list[dict[str, Any]] = [
            {"type": "message_delta", "delta": self.end(), "usage": self.usage()},
            {"type": "message_stop"},
        ]
        yield b"".join(event(part, part["type"]) for part in last)

    def take(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """Adds a piece of the answer to the blocks, and returns the events about it."""
        parts: list[dict[str, Any]] = []
        for found in self.parser.push(text) + (self.parser.end() if last else []):
            parts += self._told(found)
        if last and not self.blocks:
            parts += self._begin("text", text="")
        return parts + (self._close() if last else [])

    def _told(self, found: Event) -> list[dict[str, Any]]:
        match found:
            case Reasoning(text):
                begun = self._begin("thinking", thinking="", signature="")
                self.blocks[-1]["thinking"] += text
                return [*begun, self._delta("thinking_delta", thinking=text)]
            case Content(text):
                begun = self._begin("text", text="")
                self.blocks[-1]["text"] += text
                return [*begun, self._delta("text_delta", text=text)]
            case Call(id, name):
                return self._close() + self._begin("tool_use", id=id, name=name, input={})
            case Arguments(text):
                block = self.blocks[-1]
                block["input"] = (block["input"] or "") + text
                return [self._delta("input_json_delta", partial_json=text)]
            case CallEnd(complete):
                block = self.blocks[-1]
                if not complete:  # of a whole answer, what there is of them
                    block["input"] = from_json(block["input"] or "{}", allow_partial="trailing-strings")
                return self._close()

    def _begin(self, kind: str, **content: Any) -> list[dict[str, Any]]:
        """Begins a block, unless one of this kind is open."""
        if kind == self.open:
            return []
        closed, self.open = self._close(), kind
        self.blocks.append({"type": kind} | content)
        return [
            *closed,
            {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": {"type": kind} | content},
        ]

    def _close(self) -> list[dict[str, Any]]:
        closed = [{"type": "content_block_stop", "index": len(self.blocks) - 1}] if self.open else []
        self.open = ""
        return closed

    def _delta(self, kind: str, **content: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": {"type": kind} | content}

    def failed(self, error: ApiError) -> bytes:
        return event(anthropic_error(error), "error")
