"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.engine import Request
from ferrum_jax.server.answers import Answers, Piece
from ferrum_jax.server.apis.forms import OpenAiAnswer, TextLogprobs, prompt_logprobs
from ferrum_jax.server.bodies import OpenAiBody, SamplingBody, ignored_header
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import PING, event, respond
from ferrum_jax.server.formats import structured
from ferrum_jax.server.service import Service, service_of

Prompt = str | list[int]


class CompletionBody(OpenAiBody):
    NEUTRAL: ClassVar[dict[str, list[Any]]] = SamplingBody.NEUTRAL | {"suffix": [""]}

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    def require_supported(self, within: str = "") -> None:
        super().require_supported(within)
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: must be an integer >= 1, or 0 with echo: true", param="max_tokens")

    @property
    def prompts(self) -> list[Prompt]:
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [cast(Prompt, self.prompt)] if one or not self.prompt else cast(list[Prompt], self.prompt)


async def completions(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, CompletionBody)
    adapter = service.adapter(body.model)
    count = 1 if body.n is None else max(1, body.n)

    echoed: list[str] = []  # the texts of the prompts

    def make() -> list[Request]:
        given: dict[str, Any] = {"logprobs": body.logprobs} | structured(service, body.formats)
        if body.echo:
            given |= {"prompt_logprobs": body.logprobs, "max_tokens": body.max_tokens or (16 if body.max_tokens is None else 1)}
            decode = partial(service.engine.model.tokenizer.decode, skip_special=False)
            echoed.extend(prompt if isinstance(prompt, str) else decode(prompt) for prompt in body.prompts)
        params = body.sampling(**given)
        return service.submit_all(*(partial(service.engine.submit, prompt, params, adapter) for prompt in body.prompts))

    answers = await service.submit(request, make, count * len(body.prompts), "prompt")
    answer = _TextAnswer(service, body, answers, count, echoed)
    return await respond(answer, answers, ignored_header(body.ignored()), stream=bool(body.stream))


class _TextAnswer(OpenAiAnswer):
    """`count`: the completions of each prompt. `echoed`: the texts of the prompts, if they are part of the answer."""

    def __init__(self, service: Service, body: CompletionBody, answers: Answers, count: int, echoed: list[str]):
        super().__init__(service, body, answers.requests[::count], "text_completion", "cmpl")
        self.body, self.count, self.echoed = body, count, echoed
        self.begun: dict[int, TextLogprobs] = {}

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        choices = [
            self.choice(Piece(index, request.text, request.token_ids, request.logprobs, request.finish_reason), request)
            for index, request in enumerate(requests)
        ]
        return self.head | {"choices": choices} | self.counts(requests)

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        async for pieces in answers.batches():
            choices = (self.choice(piece, answers.requests[piece.choice]) for piece in pieces)
            yield b"".join(event(self.head | {"choices": [choice]}) for choice in choices) or PING
        yield self.end(answers.requests)

    def choice(self, piece: Piece, request: Request) -> dict[str, Any]:
        """A choice with a new part of its text. With `echo` the first one begins with the prompt."""
        ids, text, scored, reason = list(piece.token_ids), piece.text, list(piece.logprobs or ()), piece.finish_reason
        if self.body.max_tokens == 0:  # only the prompt
            ids, text, scored, reason = [], "", [], reason and "length"
        made = ids
        first = piece.choice not in self.begun
        marks = self.begun.setdefault(piece.choice, TextLogprobs(self.tokenizer, self.as_ids))
        if first and self.echoed:
            text = self.echoed[piece.choice // self.count] + text
            ids, scored = request.prompt_token_ids + ids, [*(request.prompt_logprobs or ()), *scored]
        choice = {"index": piece.choice, "text": text, "logprobs": None, "finish_reason": reason}
        choice |= self.ids(token_ids=made) | (self.ids(prompt_token_ids=request.prompt_token_ids) if first else {})
        if self.body.logprobs is not None:
            choice["logprobs"] = marks.add(ids, scored)
        if reason and request.prompt_logprobs is not None and not self.body.echo:
            choice["prompt_logprobs"] = prompt_logprobs(self.tokenizer, request.prompt_logprobs)
        return choice
