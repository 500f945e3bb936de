"""What the Responses API keeps: answers, and the conversations that led to them.

It is a table of SQLite, in memory or in a file. One thread does all work with it, so the event loop never waits for a disk.
When `put` has returned, the answer is in the file, also if the process is killed then.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ferrum_jax.server.errors import ApiError

_MOST, _MOST_BYTES = 10_000, 64 << 20  # answers in memory, and the size of all of them
_MARK, _VERSION = 0x464A5253, 1  # in the header of a file


class Kept(NamedTuple):
    """`response`: as it was sent. `items`: the input of its request. `messages`: the conversation with the answer at its
    end."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]


class Store:
    """In a file that is made if it does not exist; None: in memory, and then only the newest answers.

    Raises:
      ValueError: for a file that is not a store, or cannot be opened.
    """

    def __init__(self, path: Path | None = None):
        self._bounded = path is None
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of those in memory, the oldest first
        self._thread = ThreadPoolExecutor(1, "ferrum_jax store")
        try:
            self._table = self._thread.submit(_open, path).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ValueError(f"{path}: cannot be used as a store of conversations: {error}") from error

    async def get(self, id: str) -> Kept | None:
        """The answer with this id, if it is kept."""
        return await self._do(lambda: self._get(id))

    async def put(self, kept: Kept) -> None:
        """Keeps an answer."""
        await self._do(lambda: self._put(kept.response["id"], orjson.dumps(kept._asdict())))

    async def remove(self, id: str) -> bool:
        """Whether it was kept until now."""
        return await self._do(lambda: self._remove(id))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.submit(self._table.close)
        self._thread.shutdown()

    # Inside

    async def _do(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise ApiError(500, f"the store of conversations failed: {error}", code="store_failed") from error

    def _get(self, id: str) -> Kept | None:
        found = self._table.execute("SELECT content FROM responses WHERE id = ?", (id,)).fetchone()
        return None if found is None else Kept(**orjson.loads(found[0]))

    def _put(self, id: str, content: bytes) -> None:
        with self._table:
            self._table.execute("INSERT INTO responses VALUES (?, ?)", (id, content))
        if self._bounded:
            self._sizes[id] = len(content)
            while len(self._sizes) > _MOST or (sum(self._sizes.values()) > _MOST_BYTES and len(self._sizes) > 1):
                self._remove(next(iter(self._sizes)))

    def _remove(self, id: str) -> bool:
        self._sizes.pop(id, None)
        with self._table:
            return self._table.execute("DELETE FROM responses WHERE id = ?", (id,)).rowcount > 0


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:  # conversations are private
            if file.read(16) not in (b"", b"SQLite format 3\0"):  # SQLite would overwrite a file of one byte
                raise sqlite3.DatabaseError("it is not a database")
    table = sqlite3.connect(path or ":memory:", timeout=10)
    try:
        facts = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        mark, version, tables = (table.execute(fact).fetchone()[0] for fact in facts)
        if (mark, version) != (_MARK, _VERSION) and (mark, version, tables) != (0, 0, 0):
            raise sqlite3.DatabaseError("it is a database of something else, or of another version")
        table.execute("PRAGMA journal_mode = WAL")
        table.execute("PRAGMA synchronous = FULL")
        with table:
            table.execute("BEGIN IMMEDIATE")
            table.execute("CREATE TABLE IF NOT EXISTS responses (id TEXT PRIMARY KEY, content BLOB NOT NULL)")
            table.execute(f"PRAGMA application_id = {_MARK}")
            table.execute(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        table.close()
        raise
    return table
