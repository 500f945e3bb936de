"""What keeps a server alive: keys, limits, clients that leave or do not read, and the end."""

from __future__ import annotations

import json
import logging
import socket
import time

import openai
import pytest

from ferrum_jax.engine import Engine
from ferrum_jax.server.answers import Answers
from support.live_server import WEB, idle, live, until

LONG = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}


def open_stream(server, body):
    """A connection on which a stream has begun."""
    raw = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head + raw)
    assert b"200 OK" in connection.recv(64)
    return connection


def test_a_key_is_needed(engine):
    with live(engine, api_keys=("first", "second")) as server:
        for headers, status in [
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic first"}, 401),
            ({"authorization": b"Bearer \xff"}, 401),
            ({"authorization": "Bearer first"}, 200),
            ({"x-api-key": "second"}, 200),
        ]:
            assert WEB.get(f"{server.url}/v1/models", headers=headers).status_code == status, headers
        assert WEB.get(f"{server.url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_body_and_headers_have_limits(engine):
    with live(engine, max_body_bytes=1000, max_header_bytes=2000) as server:
        url = f"{server.url}/v1/completions"
        large = json.dumps({"prompt": "a " * 1000}).encode()
        assert WEB.post(url, content=large).status_code == 413
        chunked = WEB.post(url, content=iter([large[:600], large[600:]]))
        assert chunked.status_code == 413 and "at most 1000 bytes" in chunked.json()["error"]["message"]
        assert WEB.get(url, headers={"x-long": "a" * 3000}).status_code == 431
        assert WEB.post(url, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_path_and_a_method_that_are_not_there(server):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)]:
        reply = WEB.request(method, server.url + path)
        assert reply.status_code == status and path in reply.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(engine):
    with live(engine, max_queue=1) as server:
        held = [open_stream(server, LONG) for _ in range(4)]
        until(lambda: server.service.unfinished == 4)
        refused = WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 2})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 120
        assert WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 6}).json()["error"]["param"] == "n"
        for connection in held:
            connection.close()
        until(lambda: server.service.unfinished == 0 and idle(engine))
        assert WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1, "n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server, engine, stream):
    before = engine.metrics()["generated_tokens"]
    raw = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        until(lambda: engine.metrics()["generated_tokens"] > before)
    until(lambda: idle(engine) and not server.service.unfinished)
    assert engine.metrics()["generated_tokens"] - before < 2 * LONG["max_tokens"]


def test_a_client_that_does_not_read_costs_nobody_time(server, engine):
    """Its request goes on to its end, and it still gets all of it."""
    connection = open_stream(server, LONG | {"logprobs": 20, "n": 4})  # some hundred kilobytes
    until(lambda: idle(engine))
    assert WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    received = b""
    while b"[DONE]" not in received:
        received = received[-20:] + connection.recv(1 << 20)
    connection.close()


def test_a_request_has_a_time_limit(engine):
    with live(engine, request_timeout=0.01) as server:
        reply = WEB.post(f"{server.url}/v1/completions", json=LONG)
        assert reply.status_code == 408 and "0.01 seconds" in reply.json()["error"]["message"]
    until(lambda: idle(engine))


def test_a_stream_without_news_has_comments(engine, monkeypatch):
    with live(engine, ping_seconds=0.02) as server:
        monkeypatch.setattr(Answers, "_arrived", lambda self, index: None)  # as if the engine were reading a long prompt
        with WEB.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as reply:
            assert next(reply.iter_lines()) == ": ping"
        monkeypatch.undo()
    until(lambda: idle(engine))


def test_an_error_of_the_engine(server, engine, monkeypatch):
    """Before the first token it has a status; later it is an event that the client raises."""

    def fail(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._executor, "launch", fail)
    assert WEB.post(f"{server.url}/v1/completions", json=LONG).status_code == 500
    assert WEB.post(f"{server.url}/v1/completions", json=LONG | {"stream": True}).json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        stream = iter(
            client.completions.create(model="tiny", stream=True, extra_body={"ignore_eos": True}, prompt="a", max_tokens=200)
        )
        next(stream)
        monkeypatch.setattr(engine._executor, "launch", fail)
        with pytest.raises(openai.APIError, match="broken"):
            list(stream)
        monkeypatch.undo()
    assert WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    until(lambda: idle(engine))


def test_health_turns_bad_when_the_loop_fails(server, engine, monkeypatch):
    def fail(self):
        raise MemoryError("no room for a new cache")

    monkeypatch.setattr(Engine, "_advance", fail)
    assert WEB.post(f"{server.url}/v1/completions", json=LONG).status_code == 500
    bad = WEB.get(f"{server.url}/health")
    assert bad.status_code == 503 and "no room for a new cache" in bad.json()["error"]["message"]
    monkeypatch.undo()
    WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).raise_for_status()
    assert WEB.get(f"{server.url}/health").status_code == 200


def test_while_it_stops_nothing_new_begins(engine):
    with live(engine) as server:
        running = open_stream(server, LONG)
        server.service.draining = True
        refused = WEB.post(f"{server.url}/v1/completions", json=LONG)
        assert (
            refused.status_code == 503 and refused.headers["retry-after"] and WEB.get(f"{server.url}/health").status_code == 503
        )
        received = b""
        while b"[DONE]" not in received:
            received += running.recv(1 << 16)
        running.close()


def test_requests_have_ids_and_lines_in_the_log(server, caplog):
    with caplog.at_level(logging.INFO, "ferrum_jax.server"):
        reply = WEB.post(
            f"{server.url}/v1/completions", json={"prompt": "secret", "max_tokens": 2}, headers={"x-request-id": "one-1"}
        )
        assert reply.headers["x-request-id"] == "one-1"
        assert len(WEB.get(f"{server.url}/health", headers={"x-request-id": b"a b\xe4"}).headers["x-request-id"]) == 32
        until(lambda: len(caplog.records) >= 2)
    facts = caplog.records[0].facts
    assert (facts["path"], facts["status"], facts["request_id"]) == ("/v1/completions", 200, "one-1")
    assert facts["completion_tokens"] == 2 and "secret" not in json.dumps(facts)


def test_texts_are_in_the_log_only_if_asked(engine, caplog):
    with caplog.at_level(logging.INFO, "ferrum_jax.server"), live(engine, log_prompts=True) as server:
        reply = WEB.post(f"{server.url}/v1/completions", json={"prompt": "secret", "max_tokens": 2})
        until(lambda: caplog.records)
    facts = caplog.records[0].facts
    assert (facts["prompt"], facts["texts"]) == ("<|endoftext|>secret", [reply.json()["choices"][0]["text"]])


def test_pages_of_other_origins_are_only_let_in_if_named(server, engine):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in WEB.options(f"{server.url}/v1/completions", headers=asked).headers
    with live(engine, cors_origins=("https://a.example",), api_keys=("key",)) as open_server:
        url = f"{open_server.url}/v1/completions"
        assert WEB.options(url, headers=asked).headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in WEB.options(url, headers=asked | {"origin": "https://b.example"}).headers


def test_the_event_loop_never_waits_for_the_engine(server, engine):
    """Other requests are answered while a thread holds the engine's lock."""
    stream = open_stream(server, LONG)
    with engine._lock:
        begin = time.monotonic()
        assert WEB.get(f"{server.url}/v1/models").status_code == 200
        assert WEB.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 200
        stream.close()
        assert WEB.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - begin < 20
    until(lambda: idle(engine))
