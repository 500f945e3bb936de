"""What every request passes: an id, limits, the key, and a line in the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ferrum_jax.server import page
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.replies import error_reply
from ferrum_jax.server.service import Service

_LOG = logging.getLogger("ferrum_jax.server")
_OPEN = {"/health"} | page.paths()  # need no key
_ALWAYS = {"/health", "/metrics"}  # answers while the server is stopping


class Gate:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self._keys = [_digest(key.encode()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status, read = time.perf_counter(), 0, 0
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex
        facts = scope["ferrum"] = {"request_id": number}
        limit = self.service.settings.max_body_bytes

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _too_large(limit)
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, limited, named)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                _LOG.exception("request %s: %s %s", number, scope["method"], scope["path"])
                error = ApiError(500, "an error of the server; its log says more")
            if status:
                raise
            await error_reply(error, scope["path"], number)(scope, receive, named)
        finally:
            self._log(scope, facts, status, time.perf_counter() - begin)

    def _check(self, scope: Scope, headers: Headers) -> None:
        settings, path = self.service.settings, scope["path"].removeprefix(scope.get("root_path", ""))
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > settings.max_header_bytes:
            raise ApiError(431, f"the headers have {size} bytes; at most {settings.max_header_bytes} are allowed")
        if self._keys and path not in _OPEN and not self._knows(_key(headers)):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        if self.service.draining and path not in _ALWAYS:
            raise ApiError(503, "the server is stopping", retry_after=5)

    def _knows(self, key: bytes) -> bool:
        """In a time that depends neither on the key nor on which of the server's keys it is."""
        found = [hmac.compare_digest(_digest(key), known) for known in self._keys]
        return any(found)

    def _log(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        """Status 0: the client left before there was an answer."""
        if not _LOG.isEnabledFor(logging.INFO):
            return
        client = scope.get("client")
        line: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": status}
        line |= {"seconds": round(seconds, 4), "client": client[0] if client else "", "request_id": facts["request_id"]}
        if requests := facts.get("requests"):
            line["prompt_tokens"] = len(requests[0].prompt_token_ids)
            line["cached_tokens"] = requests[0].cached_tokens
            line["completion_tokens"] = sum(len(request.token_ids) for request in requests)
            line["finish_reasons"] = [request.finish_reason for request in requests]
            if self.service.settings.log_prompts:
                tokenizer = self.service.engine.model.tokenizer
                line["prompt"] = tokenizer.decode(requests[0].prompt_token_ids, skip_special=False)
                line["texts"] = [request.text for request in requests]
        _LOG.info("request", extra={"facts": line})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode("latin-1")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large; at most {limit} bytes are allowed")
