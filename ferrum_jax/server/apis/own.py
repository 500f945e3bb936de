"""What OpenAI's API does not have: tokens, templates, and the server itself. Names as of vLLM and llama.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax import __version__
from ferrum_jax.server.bodies import Body, ignored_header
from ferrum_jax.server.conversation import render
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.replies import Reply
from ferrum_jax.server.service import refusals, service_of


class TemplateBody(Body):
    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(TemplateBody):
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


class RoutingBody(Body):
    model: str | None = None
    tokens: list[int] = Field(min_length=1)
    start: int = Field(0, ge=0, lt=2**31)


async def health(request: HttpRequest) -> Response:
    """200 as long as requests are served."""
    reason = service_of(request).health()
    if reason:
        raise ApiError(503, reason)
    return Reply({"status": "ok"})


async def metrics(request: HttpRequest) -> Response:
    service = service_of(request)
    return Response(await service.run(service.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(request: HttpRequest) -> Response:
    service = service_of(request)
    found = [_model(request, name) for name in service.names]
    if service.embedder is not None:
        length = {"max_model_len": service.embedder.max_seq_len}
        found.append(found[0] | length | {"id": service.settings.embedding_name, "root": service.settings.embedding_name})
    return Reply({"object": "list", "data": found})


async def model(request: HttpRequest) -> Response:
    service_of(request).adapter(request.path_params["name"])
    return Reply(_model(request, request.path_params["name"]))


def _model(request: HttpRequest, name: str) -> dict[str, Any]:
    service = service_of(request)
    base = None if name == service.settings.name else service.settings.name
    described = {"id": name, "object": "model", "created": service.created, "owned_by": "ferrum_jax", "root": name}
    return described | {"parent": base, "max_model_len": service.engine.context}


async def props(request: HttpRequest) -> Response:
    """What is served, and with which shapes."""
    service = service_of(request)
    engine = service.engine
    return Reply(
        {
            "model": service.settings.name,
            "architecture": engine.model.config.architecture,
            "dtype": engine.model.config.dtype,
            "total_slots": engine.config.max_seqs,
            "n_ctx": engine.context,
            "num_pages": engine.num_pages,
            "page_size": engine.config.page_size,
            "chat_template": engine.model.tokenizer.chat_template,
            "adapters": list(engine.model.adapters),
            "num_experts": engine.model.config.num_experts if engine.model.config.expert_layers else 0,
            "end_token_ids": sorted(engine.model.tokenizer.eos_ids),
            "version": __version__,
        }
    )


async def tokenize(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, TokenizeBody)
    service.adapter(body.model)
    engine_model = service.engine.model
    text = body.content if body.prompt is None else body.prompt
    if (text is None) == (body.messages is None):
        raise ApiError(400, "either prompt (or content) or messages", param="prompt")
    special = body.add_special if body.add_special_tokens is None else body.add_special_tokens
    if special is None:  # as vLLM for `prompt`, and as llama.cpp for `content`
        special = body.prompt is not None

    def work() -> list[int]:
        if text is not None:
            return engine_model.tokenizer.encode(text, add_special=special, parse_special=body.parse_special)
        return engine_model.encode_rendered(_rendered(request, body))

    with refusals("messages" if text is None else "prompt"):
        tokens = await service.run(work)
    found: Any = tokens
    if body.with_pieces:
        found = [
            {"id": token, "piece": engine_model.tokenizer.token_bytes(token).decode("utf-8", "replace")} for token in tokens
        ]
    answer = {"tokens": found, "count": len(tokens), "max_model_len": service.engine.context}
    return Reply(answer, headers=ignored_header(body.ignored()))


async def detokenize(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, DetokenizeBody)
    service.adapter(body.model)
    with refusals("tokens"):
        text = await service.run(lambda: service.engine.model.tokenizer.decode(body.tokens, skip_special=False))
    return Reply({"prompt": text, "content": text}, headers=ignored_header(body.ignored()))


async def apply_template(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, TemplateBody)
    service.adapter(body.model)
    with refusals("messages"):
        text = await service.run(lambda: _rendered(request, body))
    return Reply({"prompt": text}, headers=ignored_header(body.ignored()))


def _rendered(request: HttpRequest, body: TemplateBody) -> str:
    service = service_of(request)
    variables, _ = service.template_variables(body.chat_template_kwargs or {})
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    return render(service, body.messages or [], body.tools or None, variables)


async def routing(request: HttpRequest) -> Response:
    """The experts of each token of a text from `start` on. The text is computed once more, next to the engine and without its
    cache: the engine's steps do not have the experts among their results, so they stay as small and as fast as they are."""
    service = service_of(request)
    body = await service.read(request, RoutingBody)
    adapter = service.adapter(body.model)
    with refusals("tokens"):
        found = await service.alone(lambda: service.tracer.trace_routing(body.tokens, adapter))
    ids, weights = found.expert_ids[:, body.start :], found.expert_weights[:, body.start :]
    answer = {
        "object": "routing",
        "start": body.start,
        "layers": found.layers.tolist(),
        "num_experts": found.num_experts,
        "experts_per_token": ids.shape[2],
        "expert_ids": ids.tolist(),
        "expert_weights": weights.astype(np.float64).round(4).tolist(),
    }
    return Reply(answer, headers=ignored_header(body.ignored()))
