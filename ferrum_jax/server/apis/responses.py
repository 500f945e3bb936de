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
from ferrum_jax.parsing import Answer
from ferrum_jax.sampling_params import MAX_LOGPROBS
from ferrum_jax.server.answers import Answers
from ferrum_jax.server.apis.forms import chat_logprobs, count_tokens
from ferrum_jax.server.apis.items import Items, messages_of
from ferrum_jax.server.apis.kept import items_of
from ferrum_jax.server.bodies import Body, SamplingBody, TextFormat, ignored_header
from ferrum_jax.server.calling import openai_calling
from ferrum_jax.server.conversation import Turn
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.service import Service, service_of
from ferrum_jax.server.store import Kept

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"  # clients ask for it with store: false; reasoning is sent as it is


class Text(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = {"verbosity": ["medium"]}

    format: TextFormat | None = None


class Effort(Body):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = {key: ["auto", "concise", "detailed"] for key in ("summary", "generate_summary")}

    effort: str | None = None


class ResponseBody(SamplingBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | {
        "background": [False],
        "conversation": [],
        "max_tool_calls": [],
        "prompt": [],
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
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Effort | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def require_supported(self, within: str = "") -> None:
        super().require_supported(within)
        if other := [name for name in self.include or [] if name not in (_LOGPROBS, _ENCRYPTED)]:
            raise ApiError(400, f"include: {other[0]!r:.80} is not supported here", param="include")

    @property
    def formats(self) -> dict[str, Any]:
        return super().formats | {"text.format": self.text and self.text.format}

    @property
    def best(self) -> int | None:
        """The alternatives of each token that are reported; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.top_logprobs is not None or _LOGPROBS in (self.include or ()) else None


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
    return earlier + messages_of(body.input)


async def responses(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, ResponseBody)
    service.adapter(body.model)
    template, unread = service.template_variables(body.chat_template_kwargs or {})
    if body.reasoning is not None and (effort := body.reasoning.effort) is not None:
        template |= service.thinking(effort != "none", "reasoning.effort", effort)
    calling = openai_calling(body.tools, body.tool_choice, body.parallel_tool_calls)
    messages = await _messages(service, body)
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    turn = Turn(service, system + messages, template, calling)

    def make() -> list[Request]:
        return turn.submit(body, body.max_output_tokens, logprobs=body.best, **structured(service, body.formats))

    answers = await service.submit(request, make, 1, "input")
    headers = ignored_header(body.ignored() + [f"chat_template_kwargs.{name}" for name in unread])
    answer = _ResponseAnswer(service, body, messages, turn, answers)
    reply = await respond(answer, answers, headers, stream=bool(body.stream))
    await answer.keep()
    return reply


class _ResponseAnswer:
    def __init__(self, service: Service, body: ResponseBody, messages: list[dict[str, Any]], turn: Turn, answers: Answers):
        self.service, self.body, self.messages, self.request = service, body, messages, answers.requests[0]
        self.tokenizer = service.engine.model.tokenizer
        self.parser, self.answer, self.number = turn.parser(), Answer(), 0
        self.items = Items(self.event, self.logprobs)
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
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": body.store,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        self.take(self.request.text, self.request.logprobs, last=True)
        self.items.end(self.status)
        return self.finished()

    @property
    def status(self) -> str:
        return "incomplete" if self.request.finish_reason == "length" else "completed"

    def take(self, text: str, scored: Any, *, last: bool) -> bytes:
        """Takes a piece of the answer, and returns the events about it."""
        events = self.parser.push(text) + (self.parser.end() if last else [])
        self.answer.add(events)
        return self.items.take(events, scored)

    def finished(self) -> dict[str, Any]:
        """The response after the end of the answer."""
        request = self.request
        prompt, made = len(request.prompt_token_ids), len(request.token_ids)
        self.found = found = self.head | {
            "status": self.status,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "output": self.items.items,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": request.cached_tokens},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": count_tokens(self.tokenizer, self.answer.reasoning)},
                "total_tokens": prompt + made,
            },
        }
        return found

    async def keep(self) -> None:
        """Keeps the whole answer, if there is one."""
        if self.found is not None and self.body.store:
            talk = [*self.messages, *messages_of(self.items.items)]
            await self.service.store.put(Kept(self.found, items_of(self.body.input), talk))

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        begun = False
        async for pieces in answers.batches():
            sent = b""
            if pieces and not begun:
                begun = True
                sent = self.event("response.created", response=self.head) + self.event(
                    "response.in_progress", response=self.head
                )
            for piece in pieces:
                sent += self.take(piece.text, piece.logprobs, last=piece.finish_reason is not None)
            yield sent or PING
        sent, found = self.items.end(self.status), self.finished()
        await self.keep()
        yield sent + self.event(f"response.{self.status}", response=found)

    def failed(self, error: ApiError) -> bytes:
        reason = {"code": "server_error", "message": error.message}
        return self.event("response.failed", response=self.head | {"status": "failed", "error": reason})

    def event(self, kind: str, **content: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number - 1} | content, kind)

    def logprobs(self, scored: Any) -> list[dict[str, Any]]:
        return [] if self.body.best is None else chat_logprobs(self.tokenizer, scored or [], self.body.best)["content"]
