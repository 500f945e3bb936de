"""Answers that are kept: in memory with a bound, in a file across restarts and kills, and as the API gives them."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import openai
import pytest

import ferrum_jax as fj
from ferrum_jax.server import store
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.store import Kept, Store
from support import ROOT
from support.live_server import WEB, live

STORY = "Once upon a time there was"
KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from ferrum_jax.server.store import Kept, Store

async def work():
    kept = Store(Path(sys.argv[1]))
    for number in range(20):
        await kept.put(Kept({"id": str(number)}, [], [{"role": "user", "content": "a" * 10_000}]))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(work())
"""


def kept(id: str, text: str = "a") -> Kept:
    return Kept({"id": id}, [{"id": "item"}], [{"role": "user", "content": text}])


def test_the_oldest_make_room_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MOST", 3)
    monkeypatch.setattr(store, "_MOST_BYTES", 1000)

    async def work() -> None:
        memory = Store()
        for number in range(4):
            await memory.put(kept(str(number)))
        assert await memory.remove("2") and not await memory.remove("2")
        assert [await memory.get(id) for id in "0123"] == [None, kept("1"), None, kept("3")]
        await memory.put(kept("4", "a" * 900))
        assert [await memory.get(id) is None for id in "134"] == [True, True, False]
        await memory.put(kept("5", "a" * 2000))  # one is always kept
        assert [await memory.get(id) is None for id in "45"] == [True, False]
        memory.close()

    asyncio.run(work())


def test_what_is_kept_is_in_the_file(tmp_path: Path) -> None:
    """Another process sees it as soon as `put` has returned."""

    async def work() -> None:
        first, second = Store(tmp_path / "store"), Store(tmp_path / "store")
        await first.put(kept("1"))
        assert await second.get("1") == kept("1") and await second.remove("1")
        assert await first.get("1") is None
        first.close(), second.close()

    asyncio.run(work())


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment)
    assert ended.returncode == -signal.SIGKILL and path.stat().st_mode & 0o077 == 0

    async def work() -> None:
        again = Store(path)
        found = [await again.get(str(number)) for number in range(20)]
        assert [each and each.response["id"] for each in found] == [str(number) for number in range(20)]
        assert found[7] and found[7].messages == [{"role": "user", "content": "a" * 10_000}]
        again.close()

    asyncio.run(work())


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("a")
    other = tmp_path / "other"
    with sqlite3.connect(other) as table:
        table.execute("CREATE TABLE responses (id TEXT)")
    for path in (text, other, tmp_path / "none" / "store", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: cannot be used as a store"):
            Store(path)
    assert text.read_text() == "a"
    with sqlite3.connect(other) as table:
        assert table.execute("PRAGMA application_id").fetchone() == (0,)


def test_a_store_that_fails_is_an_error_of_the_server(tmp_path: Path) -> None:
    async def work() -> None:
        broken = Store(tmp_path / "store")
        await asyncio.get_running_loop().run_in_executor(broken._thread, broken._table.execute, "DROP TABLE responses")
        with pytest.raises(ApiError, match="store of conversations failed") as caught:
            await broken.put(kept("1"))
        assert caught.value.status == 500
        broken.close()

    asyncio.run(work())


def test_a_conversation_goes_on_after_a_restart(engine: fj.Engine, tmp_path: Path) -> None:
    path = tmp_path / "store"
    given = {"model": "tiny", "max_output_tokens": 8, "temperature": 0.0}
    with live(engine, store=path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        talk = [{"role": "user", "content": STORY}, {"role": "user", "content": [{"type": "input_text", "text": "b"}]}]
        first = client.responses.create(input=talk, **given)
        stream = client.responses.create(input="and then", previous_response_id=first.id, stream=True, **given)
        second = [event for event in stream][-1].response
    with live(engine, store=path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        assert client.responses.retrieve(second.id).output_text == second.output_text
        third = client.responses.create(input="in the end", previous_response_id=second.id, **given)
        text = f"{STORY}\nb\n{first.output_text}\nand then\n{second.output_text}\nin the end"
        assert third.output_text == engine.submit(text, fj.SamplingParams(max_tokens=8, temperature=0.0)).result().text
        items = client.responses.input_items
        assert [item.content[0].text for item in items.list(first.id)] == ["b", STORY]
        assert [item.content[0].text for item in items.list(first.id, order="asc", limit=1)] == [STORY, "b"]  # two pages
        assert [item.content[0].text for item in items.list(second.id)] == ["and then"]
        for query in ("order=up", "limit=0", "limit=" + "9" * 5000, "after=x"):
            reply = WEB.get(f"{server.url}/v1/responses/{first.id}/input_items?{query}")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])
        assert WEB.get(f"{server.url}/v1/responses/none/input_items").status_code == 404
