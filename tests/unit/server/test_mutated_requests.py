"""Whatever a request has in place of something else, the answer is the client's error with the field named, never an error of
the server. The requests go straight into the application, without a network."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

import ferrum_jax as fj
from ferrum_jax.server import Settings, create_app
from support.live_server import idle, until

TALK = [{"role": "user", "content": "a"}]
LIMITS = {
    "max_tokens": 1, "n": 1, "stop": ["x"], "temperature": 0.5, "logprobs": 1, "stream": False, "seed": 1, "top_p": 0.9,
    "top_k": 3, "min_p": 0.1, "logit_bias": {"5": 1.0}, "presence_penalty": 0.5, "bad_words": ["b"], "model": "tiny",
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "echo": True, **LIMITS, "stream_options": {"include_usage": True}},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": [{"type": "text", "text": "b"}]}, *TALK], **LIMITS, "logprobs": True,
        "top_logprobs": 1, "chat_template_kwargs": {}, "tools": [], "response_format": {"type": "text"},
    },
    "/v1/messages": {"messages": TALK, "max_tokens": 1, "system": "b", "stop_sequences": ["x"], "tools": []},
    "/v1/messages/count_tokens": {"messages": TALK, "system": [{"type": "text", "text": "b"}]},
    "/v1/responses": {
        "input": TALK, "max_output_tokens": 1, "instructions": "b", "text": {"format": {"type": "text"}}, "include": [],
        "metadata": {"a": "b"}, "top_logprobs": 1, "store": True, "previous_response_id": None,
    },
    "/v1/embeddings": {"input": ["a"], "encoding_format": "float"},
    "/tokenize": {"prompt": "a", "with_pieces": True},
    "/detokenize": {"tokens": [1, 2]},
    "/routing": {"tokens": [5, 6], "start": 0},
    "/apply-template": {"messages": TALK, "add_generation_prompt": True},
}  # fmt: skip
VALUES = [
    None, True, -1, 0, 1.5, 1e308, -0.0, 2**31, 2**70, "", "\0", "a" * 3000, "\ud800", "\U0010ffff", "NaN", [], [[]], {},
    {"a": {"b": []}}, [None], ["a", 1], [{"role": 1}], {"type": "object"}, [{"type": "image_url"}],
]  # fmt: skip


def mutated(value: Any, chosen: random.Random) -> Any:
    """The value with one part exchanged, renamed, repeated or left out."""
    if isinstance(value, dict) and value and chosen.random() < 0.8:
        key = chosen.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        if chosen.random() < 0.1:
            return rest
        return rest | {key + "s" * (chosen.random() < 0.1): mutated(value[key], chosen)}
    if isinstance(value, list) and value and chosen.random() < 0.6:
        return [mutated(value[0], chosen), *value[1:]] * chosen.choice((1, 1, 3))
    return chosen.choice(VALUES)


async def ask(app: Any, path: str, raw: bytes) -> tuple[int, bytes]:
    """A request whose client waits for the answer."""
    sent: list[dict[str, Any]] = []
    given = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
    await app(scope | {"http_version": "1.1", "scheme": "http", "root_path": "", "client": ("a", 1)}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def check(path: str, raw: bytes, status: int, answer: bytes) -> None:
    assert status in (200, 400, 404), (path, raw, answer)
    if status == 200:
        return
    error = json.loads(answer)["error"]
    try:
        whole = isinstance(json.loads(raw), dict) and rb"\ud800" not in raw  # half a character is not JSON for the server
    except ValueError:
        whole = False
    named = error["param"] if "param" in error else error["message"].partition(":")[0]  # Anthropic's errors have no field
    assert error["message"] and (named or not whole), (path, raw, answer)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_requests_are_answered(engine: fj.Engine, count: int) -> None:
    chosen = random.Random(count)
    app = create_app(engine, Settings(name="tiny", max_queue=1000))
    seen: dict[int, int] = {}

    async def one() -> None:
        path = chosen.choice(list(BODIES))
        body = mutated(BODIES[path], chosen)
        if chosen.random() < 0.3:
            body = mutated(body, chosen)
        raw = json.dumps(body).encode()
        if chosen.random() < 0.05:
            raw = raw[: chosen.randrange(len(raw))]
        status, answer = await ask(app, path, raw)
        check(path, raw, status, answer)
        seen[status] = seen.get(status, 0) + 1

    async def some() -> None:
        for _ in range(count // 8):
            await one()

    async def work() -> None:
        await asyncio.gather(*(some() for _ in range(8)))

    asyncio.run(work())
    assert seen.keys() >= {200, 400, 404} and seen[400] > count / 4
    until(lambda: idle(engine) and not app.state.service.unfinished)
    app.state.service.stop()
