"""What goes wrong with a request, as the status code and the body that clients expect."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

LONGEST_WAIT = 120  # seconds; the client of OpenAI does not retry at all if it is told to wait longer

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 431: "request_too_large", 503: "overloaded_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error. `param`: the field that caused it. `code`: a name for programs. `retry_after`: seconds after
    which another attempt makes sense."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = None if retry_after is None else min(max(1, round(retry_after)), LONGEST_WAIT)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client has closed the connection, so no answer is of use."""


def invalid(error: ValidationError) -> ApiError:
    """What pydantic found wrong with a body: its first error that names the deepest field."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
    named = [str(part) for part in first["loc"] if not re.search(r"\W|^(str|int|float|bool)$", str(part))]  # without types
    field = ".".join(named) or None
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, param=field, code="invalid_json" if not field else None)


def refused(error: Exception, param: str) -> ApiError:
    """What the engine found wrong with a request. Its messages name a field first: `SamplingParams.top_p must ...`."""
    message = str(error).replace("SamplingParams.", "")
    found = re.match(r"(\w+)(?: must|:)", message)
    too_long = re.search(r"in(to)? a context of", message) is not None
    return ApiError(400, message, param=found[1] if found else param, code="context_length_exceeded" if too_long else None)
