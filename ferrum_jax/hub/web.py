"""Requests to the hub that answer or fail within seconds.

The idea: a socket's timeout bounds neither the name look-up nor a host with many dead addresses, so the request runs in a
daemon thread and its caller waits for at most ANSWER_SECONDS, whatever the request hangs on. Only the standard library is used:
the huggingface_hub package retries a dead hub for longer than that, and its 2.x downloads start from nothing after the process
has ended.
"""

import http.client
import json
import os
import queue
import re
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from http.client import HTTPMessage
from pathlib import Path
from typing import Any, TypeVar

from .cache import SourceError, hub_home

ANSWER_SECONDS = 4.0
_REDIRECTS = 10

T = TypeVar("T")


class HubUnreachable(SourceError):
    """No answer, or an answer that is not the hub's."""


class HubRefusal(SourceError):
    """The hub answered with an error status."""

    def __init__(self, message: str, status: int, code: str):
        super().__init__(message)
        self.status, self.code = status, code  # code: the hub's X-Error-Code, such as "EntryNotFound"


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT or the public one."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise SourceError("HF_ENDPOINT holds a user or a password, which it cannot; the hub's token goes into HF_TOKEN")
    return address


def is_offline() -> bool:
    """Whether the user has forbidden network use: $HF_HUB_OFFLINE (or $TRANSFORMERS_OFFLINE)."""
    flag = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return flag.upper() in ("1", "ON", "YES", "TRUE")


def token() -> str | None:
    """$HF_TOKEN, else the secret of a Colab notebook, else what `hf auth login` stored, else None.

    Raises SourceError, without the token, for one that cannot be sent.
    """
    if own := os.environ.get("HF_TOKEN", "").strip():
        return _sendable(own, "HF_TOKEN")
    if "google.colab" in sys.modules:
        try:
            from huggingface_hub import get_token  # installed on Colab

            return _sendable((get_token() or "").strip(), "the notebook's secret HF_TOKEN")
        except ImportError:
            pass
    path = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    try:
        stored = path.read_bytes().decode("latin-1").strip()
    except (OSError, ValueError):
        return None
    return _sendable(stored, f"the file {path}")


def _sendable(secret: str, place: str) -> str | None:
    if re.fullmatch(r"[!-~]*", secret):
        return secret or None
    raise SourceError(
        f"the token in {place} holds a line break or another character that no token has; set it again, as one word"
    )


def open_url(url: str, *, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
    """The response to a request to the hub, with the body from byte `start` on unread. The redirect of a HEAD is not followed.

    Raises HubUnreachable after ANSWER_SECONDS at most, HubRefusal for an error status.
    """

    secret = token()

    def ask() -> http.client.HTTPResponse:
        request = urllib.request.Request(url, method=method, headers={"User-Agent": "ferrum_jax"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if secret:
            request.add_unredirected_header("Authorization", f"Bearer {secret}")
        return _opener().open(request, timeout=ANSWER_SECONDS)

    return _within(ANSWER_SECONDS, ask)


def head(url: str) -> dict[str, str]:
    """The hub's headers for a file, with names in lower case, within ANSWER_SECONDS.

    Redirects within the hub are followed, and later answers override earlier ones. A redirect to elsewhere is not followed: the
    hub has said everything by then. A redirect's Content-Length is that of its own body and is ignored.
    """

    def ask() -> dict[str, str]:
        said: dict[str, str] = {}
        at = url
        for _ in range(_REDIRECTS):
            with open_url(at, method="HEAD") as answer:
                said |= {name.lower(): value for name, value in answer.headers.items()}
                if not 300 <= answer.status < 400:
                    return said
            said.pop("content-length", None)
            target = said.pop("location", "")
            if not target or not _stays(at, target, "x-repo-commit" in said and "x-linked-size" in said):
                return said
            at = urllib.parse.urljoin(at, target)
        raise HubUnreachable(f"{endpoint()} redirects in a circle")

    return _within(ANSWER_SECONDS, ask)


def _stays(url: str, target: str, all_said: bool) -> bool:
    """Whether to follow a redirect for more facts about a file: a relative one always; an absolute one to the same server, or
    from http to https there, while facts are still missing."""
    here, there = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    if not there.netloc:
        return not there.scheme
    upgraded = here.netloc == there.netloc == (here.hostname or "") and (here.scheme, there.scheme) == ("http", "https")
    return not all_said and (here[:2] == there[:2] or upgraded)


def get_json(url: str) -> Any:
    """The parsed answer to GET `url`, within ANSWER_SECONDS."""

    def ask() -> Any:
        with open_url(url) as response:
            return json.load(response)

    return _within(ANSWER_SECONDS, ask)


def read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """The next bytes of a body, up to `limit`; b"" at its end. Raises HubUnreachable if the connection is lost."""
    try:
        return response.read1(limit)
    except (OSError, http.client.HTTPException) as error:
        raise _sorted(error) from None


def _within(seconds: float, work: Callable[[], T]) -> T:
    outcome: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(1)

    def run() -> None:
        try:
            outcome.put((work(), None))
        except Exception as error:  # passed to the caller, which sorts it
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True, name="hub request").start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise HubUnreachable(f"no answer from {endpoint()} within {seconds:g} s") from None
    if error is not None:
        raise _sorted(error) from None
    return result  # type: ignore[return-value]


def _sorted(error: Exception) -> Exception:
    if isinstance(error, urllib.error.HTTPError):
        code = error.headers.get("X-Error-Code", "")
        return HubRefusal(f"{endpoint()} answers {error.code} {code or error.reason}", error.code, code)
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return HubUnreachable(f"no answer from {endpoint()} within {ANSWER_SECONDS:g} s")
    if isinstance(error, (OSError, http.client.HTTPException)):  # refused, reset, unknown name, certificate, bad answer
        reason = getattr(error, "reason", None) or error
        return HubUnreachable(f"cannot reach {endpoint()}: {getattr(reason, 'strerror', None) or repr(reason)}")
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return HubUnreachable(f"{endpoint()} does not answer as the hub does (a proxy's page?)")
    if isinstance(error, ValueError):
        return HubUnreachable(f"HF_ENDPOINT {endpoint()!r} is not an address: {error}")
    return error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Leaves the redirects of a HEAD to `head`, and sends the token only to the same host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl)[:2] == urllib.parse.urlsplit(req.full_url)[:2]:
            new.unredirected_hdrs.update(req.unredirected_hdrs)
        return new

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage) -> Any:
        if req.get_method() == "HEAD":
            return fp
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@lru_cache(1)
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if not os.environ.get("SSL_CERT_FILE") and not os.environ.get("SSL_CERT_DIR"):
        try:  # the system's certificate store is empty on some systems
            import certifi

            context.load_verify_locations(certifi.where())
        except ImportError:
            pass
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))
