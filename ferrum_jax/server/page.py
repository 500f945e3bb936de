"""The chat page: GET / and the files that it loads from web/.

All of it is part of the package and works without another network. What a model writes is not trusted, so the policy of the
page allows no scripts but these files, no connections but to this server, and HTML only from DOMPurify.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from ferrum_jax.server.errors import ApiError

FOLDER = Path(__file__).parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".txt": "text/plain"}
_HEADERS = {
    "cache-control": "no-cache",  # the browser asks each time whether its copy is still right
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _File(NamedTuple):
    content: bytes
    media_type: str
    tag: str


@functools.cache
def _files() -> dict[str, _File]:
    """The files of the page by their paths in the folder."""
    found = {}
    for path in sorted(FOLDER.rglob("*.*")):
        content = path.read_bytes()
        name = path.relative_to(FOLDER).as_posix()
        found[name] = _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


@functools.cache
def paths() -> frozenset[str]:
    """Where the page and its files are: a browser asks for them without a key."""
    return frozenset({"/", *(f"/web/{name}" for name in _files())})


async def file(request: Request) -> Response:
    """The page, or one of its files."""
    name = request.path_params.get("name", "index.html")
    found = _files().get(name)
    if found is None:
        raise ApiError(404, f"there is nothing at {request.url.path}")
    headers = {**_HEADERS, "etag": found.tag}
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
