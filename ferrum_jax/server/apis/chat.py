"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.parsing import Answer, Arguments, Call, Content, Event, Reasoning
from ferrum_jax.sampling_params import MAX_LOGPROBS
from ferrum_jax.server.answers import Answers, Piece
from ferrum_jax.server.apis.forms import OpenAiAnswer, Scored, chat_logprobs, prompt_logprobs
from ferrum_jax.server.bodies import OpenAiBody, SamplingBody, ignored_header
from ferrum_jax.server.calling import openai_calling
from ferrum_jax.server.conversation import Turn
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.service import Service, service_of


class ChatBody(OpenAiBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | {
        "functions": [[]],
        "function_call": ["none"],
        "verbosity": [],
        "modalities": [["text"]],
        "audio": [],
        "prediction": [],
        "web_search_options": [],
        "store": [False],
        "echo": [False],
        "chat_template": [],
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    answer_token_ids: list[int] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def require_supported(self, within: str = "") -> None:
        super().require_supported(within)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
        if self.answer_token_ids and self.continue_final_message:
            raise ApiError(400, "answer_token_ids: not together with continue_final_message", param="answer_token_ids")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                400, "max_tokens and max_completion_tokens are the same, and are given differently", param="max_tokens"
            )

    @property
    def best(self) -> int | None:
        """The alternatives of each token that are reported; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


async def chat_completions(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, ChatBody)
    service.adapter(body.model)
    template, unread = service.template_variables(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        template |= service.thinking(body.reasoning_effort != "none", "reasoning_effort", body.reasoning_effort)
    if body.add_generation_prompt is not None:
        template["add_generation_prompt"] = body.add_generation_prompt
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    calling = openai_calling(body.tools, body.tool_choice, body.parallel_tool_calls)
    goes_on, beginning = bool(body.continue_final_message), body.answer_token_ids or []
    turn = Turn(service, body.messages, template, calling, goes_on=goes_on, beginning=beginning)

    def make() -> list[Request]:
        return turn.submit(body, limit, logprobs=body.best, **structured(service, body.formats))

    answers = await service.submit(request, make, max(1, 1 if body.n is None else body.n), "messages")
    headers = ignored_header(body.ignored() + [f"chat_template_kwargs.{name}" for name in unread])
    return await respond(_ChatAnswer(service, body, turn, answers), answers, headers, stream=bool(body.stream))


class _Choice:
    """One of the completions: what has been told of it."""

    def __init__(self, turn: Turn):
        self.parser, self.answer, self.begun = turn.parser(), Answer(), False

    def take(self, text: str, *, last: bool) -> list[Event]:
        """The events of a further piece of text."""
        events = self.parser.push(text) + (self.parser.end() if last else [])
        self.answer.add(events)
        return events

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.answer.calls else reason


class _ChatAnswer(OpenAiAnswer):
    def __init__(self, service: Service, body: ChatBody, turn: Turn, answers: Answers):
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, body, answers.requests[:1], kind, "chatcmpl")
        self.best, self.turn = body.best, turn
        self.choices = [_Choice(turn) for _ in answers.requests]

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = []
        for index, (request, choice) in enumerate(zip(requests, self.choices, strict=True)):
            choice.take(self.turn.beginning + request.text, last=True)
            choices.append(
                {
                    "index": index,
                    "message": _message(choice.answer),
                    "logprobs": self.logprobs(request.logprobs),
                    "finish_reason": choice.finish_reason(request.finish_reason),
                    **self.ids(token_ids=request.token_ids),
                }
            )
        scored = requests[0].prompt_logprobs
        prompt = {} if scored is None else {"prompt_logprobs": prompt_logprobs(self.tokenizer, scored)}
        ids = self.ids(prompt_token_ids=requests[0].prompt_token_ids)
        return self.head | {"choices": choices} | self.counts(requests) | prompt | ids

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        async for pieces in answers.batches():
            yield b"".join(self.chunk(choice) for piece in pieces for choice in self.deltas(piece)) or PING
        yield self.end(answers.requests)

    def chunk(self, choice: dict[str, Any]) -> bytes:
        first = self.ids(prompt_token_ids=self.prompts[0].prompt_token_ids) if "role" in choice["delta"] else {}
        return event(self.head | {"choices": [choice]} | first)

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The choices of one or several chunks: the role first, the reason of the end last."""
        plain = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        choice, scored, ids = self.choices[piece.choice], self.logprobs(piece.logprobs), self.ids(token_ids=piece.token_ids)
        text = piece.text
        if not choice.begun:
            choice.begun, text = True, self.turn.beginning + text
            yield plain | {"delta": {"role": "assistant", "content": ""}}
        news = {"logprobs": scored} | ids  # with the first part of what is new
        count = len(choice.answer.calls)
        for found in choice.take(text, last=piece.finish_reason is not None):
            count += isinstance(found, Call)
            if delta := _delta(found, count - 1):
                yield plain | {"delta": delta} | news
                news = {}
        if news and (piece.logprobs or (ids and piece.token_ids)):
            yield plain | {"delta": {"content": ""}} | news
        if piece.finish_reason is not None:
            yield plain | {"finish_reason": choice.finish_reason(piece.finish_reason)}

    def reasoning(self) -> str:
        return "".join(choice.answer.reasoning for choice in self.choices)

    def logprobs(self, scored: list[Scored] | None) -> dict[str, Any] | None:
        return None if scored is None or self.best is None else chat_logprobs(self.tokenizer, scored, self.best, self.as_ids)


def _message(answer: Answer) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
    message = {"role": "assistant", "content": answer.content or (None if calls else ""), "refusal": None}
    message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return message | ({"tool_calls": calls} if calls else {})


def _delta(found: Event, index: int) -> dict[str, Any]:
    """The part of a message that an event brings. `index`: of the newest call."""
    match found:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case Call(id, name):
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]}
        case Arguments(text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {}
