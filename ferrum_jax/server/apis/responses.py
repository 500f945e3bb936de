"""OpenAI's Responses API: POST /v1/responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.sampling_params import MAX_LOGPROBS
from ferrum_jax.server.answers import Answers
from ferrum_jax.server.apis.forms import chat_logprobs
from ferrum_jax.server.apis.kept import items_of
from ferrum_jax.server.bodies import Body, SamplingBody, TextFormat, ignored_header
from ferrum_jax.server.conversation import encode, room, text_of
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.service import Service, service_of
from ferrum_jax.server.store import Kept

_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")


class Text(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = {"verbosity": ["medium"]}

    format: TextFormat | None = None


class ResponseBody(SamplingBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | {
        "tools": [[]],
        "tool_choice": ["none", "auto"],
        "parallel_tool_calls": [True, False],
        "background": [False],
        "conversation": [],
        "max_tool_calls": [],
        "prompt": [],
        "reasoning": [{}],
        "truncation": ["disabled"],
        "context_management": [],
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: Literal[1] | None = None
    previous_response_id: str | None = None
    store: bool = True
    text: Text | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def require_supported(self, within: str = "") -> None:
        super().require_supported(within)
        if other := [name for name in self.include or [] if name != _LOGPROBS]:
            raise ApiError(400, f"include: {other[0]!r:.80} is not supported here", param="include")

    @property
    def formats(self) -> dict[str, Any]:
        return super().formats | {"text.format": self.text and self.text.format}

    @property
    def best(self) -> int | None:
        """The alternatives of each token that are reported; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.top_logprobs is not None or self.include else None


async def _messages(service: Service, body: ResponseBody) -> list[dict[str, Any]]:
    """The conversation without the instructions: what was kept of the earlier one, and the input."""
    earlier: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        kept = await service.store.get(body.previous_response_id)
        if kept is None:
            message = f"the response {body.previous_response_id!r:.80} is not kept here"
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        earlier = kept.messages
    if isinstance(body.input, str):
        return [*earlier, {"role": "user", "content": body.input}]
    found = []
    for i, item in enumerate(body.input):
        if item.get("type", "message") != "message":
            raise ApiError(400, f"input.{i}: {item['type']!r:.40} is not supported here", param=f"input.{i}")
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES or not isinstance(content, str | list):
            raise ApiError(400, f"input.{i}: a message has a role ({', '.join(_ROLES)}) and content", param=f"input.{i}")
        found.append({"role": role, "content": text_of(content, f"input.{i}.content")})
    return earlier + found


async def responses(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, ResponseBody)
    adapter = service.adapter(body.model)
    template, unread = service.template_variables(body.chat_template_kwargs or {})
    messages = await _messages(service, body)
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []

    def make() -> list[Request]:
        ids = encode(service, system + messages, template)
        limit = room(service, ids) if body.max_output_tokens is None else body.max_output_tokens
        given: dict[str, Any] = {"max_tokens": limit, "logprobs": body.best} | structured(service, body.formats)
        return service.engine.submit(ids, body.sampling(**given), adapter).choices

    answers = await service.submit(request, make, 1, "input")
    headers = ignored_header(body.ignored() + [f"chat_template_kwargs.{name}" for name in unread])
    answer = _ResponseAnswer(service, body, messages, answers)
    reply = await respond(answer, answers, headers, stream=bool(body.stream))
    await answer.keep()
    return reply


class _ResponseAnswer:
    def __init__(self, service: Service, body: ResponseBody, messages: list[dict[str, Any]], answers: Answers):
        self.service, self.body, self.messages, self.request = service, body, messages, answers.requests[0]
        self.tokenizer = service.engine.model.tokenizer
        self.item = f"msg_{uuid.uuid4().hex}"
        self.number = 0
        self.found: dict[str, Any] | None = None  # the whole answer
        params, text = self.request.params, body.text and body.text.format
        self.head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model or service.settings.name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "store": body.store,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        request, cut = self.request, self.request.finish_reason == "length"
        prompt, made = len(request.prompt_token_ids), len(request.token_ids)
        self.found = found = self.head | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.message("incomplete" if cut else "completed", [self.part(request.text, request.logprobs)])],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": request.cached_tokens},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + made,
            },
        }
        return found

    async def keep(self) -> None:
        """Keeps the whole answer, if there is one."""
        if self.found is not None and self.body.store:
            talk = [*self.messages, {"role": "assistant", "content": self.request.text}]
            await self.service.store.put(Kept(self.found, items_of(self.body.input), talk))

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        begun = False
        where = {"item_id": self.item, "output_index": 0, "content_index": 0}
        async for pieces in answers.batches():
            sent = b""
            if pieces and not begun:
                begun = True
                sent = self.event("response.created", response=self.head) + self.event(
                    "response.in_progress", response=self.head
                )
                sent += self.event("response.output_item.added", output_index=0, item=self.message("in_progress", []))
                sent += self.event("response.content_part.added", **where, part=self.part("", []))
            for piece in pieces:
                if piece.text or piece.logprobs:
                    scored = self.logprobs(piece.logprobs)
                    sent += self.event("response.output_text.delta", **where, delta=piece.text, logprobs=scored)
            yield sent or PING
        found = self.whole(answers.requests)
        await self.keep()
        item = found["output"][0]
        part = item["content"][0]
        sent = self.event("response.output_text.done", **where, text=part["text"], logprobs=part["logprobs"])
        sent += self.event("response.content_part.done", **where, part=part)
        sent += self.event("response.output_item.done", output_index=0, item=item)
        yield sent + self.event(f"response.{found['status']}", response=found)

    def failed(self, error: ApiError) -> bytes:
        reason = {"code": "server_error", "message": error.message}
        return self.event("response.failed", response=self.head | {"status": "failed", "error": reason})

    def event(self, kind: str, **content: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number - 1} | content, kind)

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, scored: Any) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(scored)}

    def logprobs(self, scored: Any) -> list[dict[str, Any]]:
        return [] if self.body.best is None else chat_logprobs(self.tokenizer, scored or [], self.body.best)["content"]
