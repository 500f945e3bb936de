"""The ASGI application: which path leads where, and how an error becomes an answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ferrum_jax.embedding import EmbeddingModel
from ferrum_jax.engine import Engine
from ferrum_jax.server import page
from ferrum_jax.server.apis import chat, completions, embeddings, kept, messages, own, responses
from ferrum_jax.server.bodies import IGNORED
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.gate import Gate
from ferrum_jax.server.replies import error_reply
from ferrum_jax.server.service import Service
from ferrum_jax.server.settings import Settings

_ROUTES = (
    ("GET", "/health", own.health),
    ("GET", "/metrics", own.metrics),
    ("GET", "/props", own.props),
    ("GET", "/v1/models", own.models),
    ("GET", "/v1/models/{name:path}", own.model),
    ("POST", "/tokenize", own.tokenize),
    ("POST", "/detokenize", own.detokenize),
    ("POST", "/apply-template", own.apply_template),
    ("POST", "/routing", own.routing),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/responses", responses.responses),
    ("GET", "/v1/responses/{id}", kept.response),
    ("DELETE", "/v1/responses/{id}", kept.response),
    ("GET", "/v1/responses/{id}/input_items", kept.input_items),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("POST", "/v1/embeddings", embeddings.embeddings),
)
_PAGE = (("GET", "/", page.file), ("GET", "/web/{name:path}", page.file))


def create_app(engine: Engine, settings: Settings = Settings(), embedder: EmbeddingModel | None = None) -> Starlette:
    """An ASGI application that serves an engine. `app.state.service` has its state.

    It starts the engine's background loop, and ends it at the shutdown, unless it runs already. If the application is mounted
    in another one, whose lifespan it does not see, the first request starts the loop, and the owner of the engine ends it.

    Args:
      engine: the engine.
      settings: the name of the model, keys, limits, and whether there is a chat page.
      embedder: for /v1/embeddings.
    """
    service = Service(engine, settings, embedder)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.run(service.start)
        yield
        await service.run(service.stop)

    middleware = [Middleware(Gate, service=service)]
    if settings.cors_origins:  # before the key: a browser asks for permission without one
        exposed = ["x-request-id", IGNORED, "retry-after"]
        origins = {"allow_origins": settings.cors_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, expose_headers=exposed, **origins))  # type: ignore[arg-type]
    routes = _ROUTES + _PAGE if settings.web else _ROUTES
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in routes],
        middleware=middleware,
        exception_handlers={ApiError: _failed, HTTPException: _no_route},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _reply(request: Request, error: ApiError) -> Response:
    return error_reply(error, request.url.path, request.scope.get("ferrum", {}).get("request_id", ""))


async def _failed(request: Request, error: ApiError) -> Response:
    return _reply(request, error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    method, path = request.method, request.url.path
    what = f"{method} is not a method of {path}" if error.status_code == 405 else f"there is nothing at {path}"
    return _reply(request, ApiError(error.status_code, what if error.status_code in (404, 405) else error.detail))
