"""A process that serves: sockets, signals, the log.

SIGTERM drains: new requests are refused with 503, also on new connections, and the process ends when those that run are
finished or the time for that is over. SIGINT, or a second SIGTERM, ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ferrum_jax.server.service import Service

_KEEP_ALIVE = 75  # seconds; longer than those of the usual proxies, which must be the ones to close
_LAST = 2  # seconds for connections to close when nothing runs any more


def bind(host: str, port: int, uds: Path | None) -> socket.socket:
    """A socket that does not listen yet. Raises OSError if the address is taken or not there."""
    if uds is not None:
        if uds.exists() and stat.S_ISSOCK(uds.stat().st_mode) and not _answers(uds):
            uds.unlink()  # left by a process that was killed
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(uds))
        return bound
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def address(bound: socket.socket) -> str:
    """Where a socket is reached."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Starlette, bound: socket.socket, *, drain_timeout: float, ready: Callable[[], object]) -> None:
    """Serves an application of `create_app` until a signal ends it; in the main thread. `ready` is called when requests are
    taken."""
    _log_as_json()
    config = uvicorn.Config(
        app, lifespan="on", log_config=None, access_log=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST, ws="none",
    )  # fmt: skip
    path = bound.getsockname() if bound.family == socket.AF_UNIX else None
    try:
        _Server(config, app.state.service, drain_timeout, ready).run(sockets=[bound])
    finally:
        if path is not None:
            Path(path).unlink(missing_ok=True)


def tell_systemd(state: str) -> None:
    """Tells systemd, if it has started this process (Type=notify)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


class _Server(uvicorn.Server):
    """uvicorn's server, which drains."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout: float, ready: Callable[[], object]):
        super().__init__(config)
        self._service, self._drain_timeout, self._ready = service, drain_timeout, ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
        tell_systemd("READY=1")

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and not self._service.draining:
            self._service.draining = True
        else:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.end_all()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_timeout
        while self._service.unfinished and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True


class _Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in (("ferrum_jax", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _answers(path: os.PathLike[str]) -> bool:
    """Whether a process listens at a path."""
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(os.fspath(path)) == 0
