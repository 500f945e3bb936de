"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.sampling_params import MAX_LOGPROBS
from ferrum_jax.server.answers import Answers, Piece
from ferrum_jax.server.apis.forms import OpenAiAnswer, Scored, chat_logprobs, prompt_logprobs
from ferrum_jax.server.bodies import OpenAiBody, SamplingBody, ignored_header
from ferrum_jax.server.conversation import begun, encode, room, text_of_last
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.service import Service, service_of


class ChatBody(OpenAiBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | {
        "tools": [[]],
        "tool_choice": ["none"],
        "parallel_tool_calls": [True, False],
        "functions": [[]],
        "function_call": ["none"],
        "reasoning_effort": [],
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
    adapter = service.adapter(body.model)
    template, unread = service.template_variables(body.chat_template_kwargs or {})
    if body.add_generation_prompt is not None:
        template["add_generation_prompt"] = body.add_generation_prompt
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens

    def make() -> list[Request]:
        ids = encode(service, body.messages, template, goes_on=bool(body.continue_final_message))
        ids += begun(service, body.answer_token_ids or [])
        given: dict[str, Any] = {"max_tokens": room(service, ids) if limit is None else limit, "logprobs": body.best}
        given |= structured(service, body.formats)
        return service.engine.submit(ids, body.sampling(**given), adapter).choices

    answers = await service.submit(request, make, max(1, 1 if body.n is None else body.n), "messages")
    headers = ignored_header(body.ignored() + [f"chat_template_kwargs.{name}" for name in unread])
    return await respond(_ChatAnswer(service, body, answers), answers, headers, stream=bool(body.stream))


class _ChatAnswer(OpenAiAnswer):
    def __init__(self, service: Service, body: ChatBody, answers: Answers):
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, body, answers.requests[:1], kind, "chatcmpl")
        self.best, self.begun = body.best, set[int]()
        self.beginning = text_of_last(service, self.prompts[0].prompt_token_ids, len(body.answer_token_ids or []))

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self.beginning + request.text, "refusal": None},
                "logprobs": self.logprobs(request.logprobs),
                "finish_reason": request.finish_reason,
                **self.ids(token_ids=request.token_ids),
            }
            for index, request in enumerate(requests)
        ]
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
        ids = self.ids(token_ids=piece.token_ids)
        if piece.choice not in self.begun:
            self.begun.add(piece.choice)
            yield plain | {"delta": {"role": "assistant", "content": self.beginning}}
        if piece.text or piece.logprobs or (ids and piece.token_ids):
            yield plain | {"delta": {"content": piece.text}, "logprobs": self.logprobs(piece.logprobs)} | ids
        if piece.finish_reason is not None:
            yield plain | {"finish_reason": piece.finish_reason}

    def logprobs(self, scored: list[Scored] | None) -> dict[str, Any] | None:
        return None if scored is None or self.best is None else chat_logprobs(self.tokenizer, scored, self.best, self.as_ids)
