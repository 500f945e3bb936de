"""A server of an engine on the loopback device, as clients see it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

import ferrum_jax as fj
from ferrum_jax.server import Settings, create_app
from ferrum_jax.server.service import Service

WEB = httpx.Client(timeout=120.0)  # a busy machine takes its time


class Live:
    """`url`: where it is; `service`: its inside."""

    def __init__(self, port: int, service: Service):
        self.port, self.url, self.service = port, f"http://127.0.0.1:{port}", service


@contextlib.contextmanager
def live(engine: fj.Engine, embedder: fj.EmbeddingModel | None = None, **settings: Any) -> Iterator[Live]:
    """Serves until the end of the block."""
    app = create_app(engine, Settings(**{"name": "tiny", "ping_seconds": 60.0, **settings}), embedder)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Live(bound.getsockname()[1], app.state.service)
    finally:
        server.should_exit = True
        thread.join()


def until(reached: Any, seconds: float = 30.0) -> None:
    """Waits for a condition; fails if it does not come true."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def idle(engine: fj.Engine) -> bool:
    """Whether nothing runs or waits, and every page is free or cached."""
    found = engine.metrics()
    whole = found["pages_free"] + found["pages_cached"] == engine.num_pages
    return whole and not found["requests_running"] and not found["requests_waiting"]
