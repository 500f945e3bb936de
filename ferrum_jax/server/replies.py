"""Answers in one piece."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from ferrum_jax.server.errors import ApiError


class Reply(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_reply(error: ApiError, path: str, request_id: str) -> Reply:
    """An error in the form of the API that a path belongs to."""
    anthropic = "/v1/messages" in path
    body = anthropic_error(error) | {"request_id": request_id} if anthropic else error.body()
    return Reply(body, error.status, error.headers)


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = error.body()["error"]["type"]
    return {"type": "error", "error": {"type": "api_error" if kind == "server_error" else kind, "message": error.message}}
