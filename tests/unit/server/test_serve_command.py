"""`ferrum-jax serve` and `bench-serve` as processes and as verbs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from ferrum_jax.cli import main
from ferrum_jax.server.store import Store
from support import ROOT
from support.live_server import Live, until

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "FERRUM_JAX_PROGRESS": "0"}
SMALL = ("--max-seqs", "2", "--token-budget", "16", "--num-pages", "40", "--max-seq-len", "256", "--dtype", "float32")


@contextlib.contextmanager
def serving(tmp_path: Path, *flags: str):
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "ferrum_jax", "serve", "--uds", str(path), *SMALL, *flags]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process, path, tmp_path / "log"
    finally:
        process.kill()
        process.wait()


def client_of(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server", timeout=120)


@pytest.mark.slow
def test_a_process_finishes_what_runs_and_ends_with_0(tmp_path):
    """Over a Unix socket. Its first line says that it is ready, so nothing compiles later; SIGTERM refuses what is new."""
    with serving(tmp_path) as (server, path, log), client_of(path) as client:
        assert server.stdout.readline() == f"tiny is served at unix:{path}\n"
        compiled = re.findall(r"compiled_programs_total{.*} (.*)", client.get("/metrics").text)
        body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 200, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert next(line for line in lines if line.startswith("data: "))
            assert re.findall(r"compiled_programs_total{.*} (.*)", client.get("/metrics").text) == compiled != ["0.0"]
            server.send_signal(signal.SIGTERM)
            until(lambda: client.get("/health").status_code == 503)
            assert client.post("/v1/chat/completions", json=body).status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        assert server.wait(60) == 0 and not path.exists()
        lines = log.read_text().splitlines()
    assert "does not have a chat template" in lines[0]
    facts = [json.loads(line) for line in lines[1:]]
    assert [each["status"] for each in facts if each.get("path") == "/v1/chat/completions"] == [503, 200]


@pytest.mark.slow
def test_a_killed_server_loses_no_conversation(tmp_path):
    with serving(tmp_path, "--store", str(tmp_path / "store"), "--no-warm-up") as (server, path, _), client_of(path) as client:
        assert server.stdout.readline()
        body = {"input": "Once upon a time", "max_output_tokens": 4, "stream": True}
        ids = [client.post("/v1/responses", json=body | {"stream": False}).json()["id"]]
        with client.stream("POST", "/v1/responses", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    last = json.loads(line.removeprefix("data: "))
            server.kill()
        ids.append(last["response"]["id"])

    async def work():
        found = Store(tmp_path / "store")
        assert [(await found.get(id)).response["status"] for id in ids] == ["incomplete"] * 2
        found.close()

    asyncio.run(work())


def test_mistakes_are_told_before_the_model_is_loaded(capsys, tmp_path):
    (tmp_path / "text").write_text("a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            (("--port", port), f"cannot listen at 127.0.0.1:{port}: Address already in use"),
            (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1:8000"),
            (("--api-key", "a", "--api-key-file", __file__), "--api-key and --api-key-file are both given"),
            (("--api-key", " "), "--api-key is empty"),
            (("--adapter", "poems"), "'poems' is not NAME=PATH"),
            (("--port", "0", "--store", str(tmp_path / "text")), f"--store {tmp_path / 'text'}: cannot be used as a store"),
            (("--adapter", f"tiny={tmp_path}"), "--adapter tiny: the model has this name"),
        ]:
            assert main(["serve", *arguments]) == 2
            assert message in capsys.readouterr().err


def test_bench_serve_counts_what_it_receives(server: Live, capsys):
    arguments = ["--requests", "6", "--concurrency", "3", "--prompt-tokens", "10", "--gen-tokens", "9", "--json"]
    assert main(["bench-serve", server.url, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["errors"], found["completion_tokens"], found["tokens_equal_usage"]) == ("tiny", 0, 54, True)
    assert found["time_to_first_token_ms"]["p99"] >= found["time_to_first_token_ms"]["p50"] > 0


def test_bench_serve_tells_a_wrong_count(capsys):
    """A server whose usage is not what was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as bound:

        def answer() -> None:
            connection, _ = bound.accept()
            with connection:
                connection.recv(1 << 16)
                event = b'data: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 2, "prompt_tokens": 1}}\n\n'
                connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + event)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # closed with unread bytes, it would be reset
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert main(["bench-serve", url, "--requests", "1", "--gen-tokens", "3", "--model", "m", "--json"]) == 0
        thread.join()
    found = json.loads(capsys.readouterr().out)
    assert (found["errors"], found["first_error"]) == (1, "usage: 2 tokens instead of 3")
    assert not found["tokens_equal_usage"]
