"""Many clients that come, go, leave in the middle, read slowly and send rubbish, for a long time.

    python -m benchmarks.soak                            # an hour, the tiny model
    python -m benchmarks.soak MODEL --seconds 600 --clients 64

It starts a server as another process. What must hold: no status of 500 or more, memory that does not grow, all pages and slots
free at the end, and metrics that add up with each other and with what clients received.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

WORDS = ["iron", "copper", "gold", "tin", "lead", "zinc", "silver", "smith", "hammer", "fire", "stone", "river", "old"]
WARM = 0.3  # the part of the time after which memory must not grow
SMALL = ("--max-seqs", "8", "--num-pages", "400", "--token-budget", "128", "--max-seq-len", "512", "--max-queue", "64")


class Server(NamedTuple):
    port: int
    pid: int


@contextlib.contextmanager
def served(model: str, *flags: str) -> Iterator[Server]:
    """A server that is ready; SIGTERM must end it with 0."""
    command = [sys.executable, "-m", "ferrum_jax", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "is served at" not in line:
            raise RuntimeError("the server did not start")
        yield Server(int(line.rpartition(":")[2]), process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def memory(pid: int) -> int:
    """The resident bytes of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client:
    """Sends one request after the other, each of a random kind, and counts what came back in `seen`."""

    def __init__(self, port: int, seed: int, seen: Counter[str]):
        self._port, self._chosen, self._seen = port, random.Random(seed), seen

    async def run(self, deadline: float) -> None:
        kinds = [self.whole] * 6 + [self.leave] * 3 + [self.crawl] + [self.rubbish] * 2 + [self.half_close] + [self.stored]
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._chosen.choice(kinds)()
            await asyncio.sleep(self._chosen.expovariate(20))

    async def whole(self) -> None:
        """An answer that is read to its end and counted."""
        path, body = self._request()
        status, answer = await self._ask("POST", path, json.dumps(body).encode())
        if status != 200:
            return
        tokens = output_tokens(answer)
        self._seen["answers"] += 1
        self._seen["received tokens"] += tokens
        ended = not body["stream"] or any(end in answer[-100:] for end in (b"[DONE]", b"message_stop"))
        self._seen["incomplete answers"] += not ended or not 0 < tokens <= body["max_tokens"]

    async def leave(self) -> None:
        """A client that closes the connection before, or in the middle of, its answer."""
        path, body = self._request()
        reader, writer = await self._send("POST", path, json.dumps(body | {"stream": True}).encode())
        for _ in range(self._chosen.randrange(4)):
            await reader.read(200)
        self._seen["left"] += 1
        writer.close()

    async def crawl(self) -> None:
        """A client that reads a few bytes at a time."""
        path, body = self._request()
        reader, writer = await self._send("POST", path, json.dumps(body | {"stream": True}).encode())
        for _ in range(60):
            if not await reader.read(300):
                break
            await asyncio.sleep(0.05)
        self._seen["crawled"] += 1
        writer.close()

    async def half_close(self) -> None:
        """A client that closes its sending side at once."""
        path, body = self._request()
        reader, writer = await self._send("POST", path, json.dumps(body).encode())
        writer.write_eof()
        await reader.read()
        writer.close()

    async def rubbish(self) -> None:
        """Bytes that are not HTTP, JSON that is cut, fields with wrong values."""
        path, body = self._request()
        kind = self._chosen.randrange(4)
        if kind == 0:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(self._chosen.randbytes(self._chosen.randrange(1, 2000)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 1)
            writer.close()
            return
        raw = json.dumps(body).encode()
        if kind == 1:
            raw = raw[: self._chosen.randrange(1, len(raw))]
        elif kind == 2:
            wrong = self._chosen.choice([None, -1, "x", [], {}, 2**70])
            raw = json.dumps(body | {self._chosen.choice(list(body)): wrong}).encode()
        await self._ask("POST" if kind < 3 else "GET", path, raw)
        self._seen["rubbish"] += 1

    async def stored(self) -> None:
        """A conversation that is kept, continued and deleted."""
        earlier = None
        for _ in range(2):
            body = {"input": self._text(), "max_output_tokens": 4, "previous_response_id": earlier}
            status, answer = await self._ask("POST", "/v1/responses", json.dumps(body).encode())
            if status != 200:
                return
            earlier = json.loads(answer)["id"]
            self._seen["received tokens"] += json.loads(answer)["usage"]["output_tokens"]
        status, _ = await self._ask("GET", f"/v1/responses/{earlier}", b"")
        self._seen["lost conversations"] += status == 404
        await self._ask("DELETE", f"/v1/responses/{earlier}", b"")

    # Inside

    def _text(self) -> str:
        return " ".join(self._chosen.choices(WORDS, k=self._chosen.randint(1, 120)))

    def _request(self) -> tuple[str, dict[str, Any]]:
        most, stream = self._chosen.randint(1, 40), self._chosen.random() < 0.7
        talk = [{"role": "user", "content": self._text()}]
        body: dict[str, Any] = {"max_tokens": most, "stream": stream, "temperature": self._chosen.choice([0, 1.0])}
        path = self._chosen.choice(["/v1/completions", "/v1/chat/completions", "/v1/messages"])
        if path != "/v1/messages" and stream:
            body["stream_options"] = {"include_usage": True}
        return path, body | ({"prompt": self._text()} if path == "/v1/completions" else {"messages": talk})

    async def _send(self, method: str, path: str, raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        return reader, writer

    async def _ask(self, method: str, path: str, raw: bytes) -> tuple[int, bytes]:
        reader, writer = await self._send(method, path, raw)
        try:
            answer = await reader.read()
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
        self._seen[f"status {status}"] += 1
        return status, body


def output_tokens(answer: bytes) -> int:
    """The last number of output tokens in an answer."""
    for name in (b'"completion_tokens":', b'"output_tokens":'):
        _, found, rest = answer.rpartition(name)
        if found:
            return int(rest[: len(rest) - len(rest.lstrip(b"0123456789"))])
    return 0


async def metrics(port: int) -> dict[str, float]:
    """The sums of all metrics over their labels, without buckets."""
    _, text = await Client(port, 0, Counter())._ask("GET", "/metrics", b"")
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[sample.name] += sample.value
    return found


async def soak(server: Server, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """The report; its `faults` should be empty."""
    seen: Counter[str] = Counter()
    begin = time.monotonic()
    running = asyncio.gather(*(Client(server.port, seed + i, seen).run(begin + seconds) for i in range(clients)))
    sizes: list[tuple[float, int]] = []
    while not running.done():
        await asyncio.sleep(min(1.0, seconds / 20))
        sizes.append((time.monotonic() - begin, memory(server.pid)))
    await running
    for _ in range(200):
        last = await metrics(server.port)
        if not last["ferrum_num_requests_running"] + last["ferrum_num_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    warm = [size for at, size in sizes if WARM * seconds <= at <= (WARM + 0.2) * seconds]
    late = [size for at, size in sizes if 0.8 * seconds <= at <= seconds]
    drift = statistics.median(late) / statistics.median(warm) - 1
    return {
        "seconds": seconds,
        "clients": clients,
        "seen": dict(sorted(seen.items())),
        "memory_mib": {"warm": round(statistics.median(warm) / 2**20, 1), "late": round(statistics.median(late) / 2**20, 1)},
        "memory_drift_percent": round(100 * drift, 2),
        "faults": faults(seen, last),
    }


def faults(seen: Counter[str], last: dict[str, float]) -> list[str]:
    """What does not hold, in words."""
    found = [f"{name}: {count}" for name, count in seen.items() if name.startswith("status 5") and count]
    found += [f"{name}: {seen[name]}" for name in ("incomplete answers", "lost conversations") if seen[name]]
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if last[f"ferrum_{name}"]:
            found.append(f"{name} is {last[f'ferrum_{name}']} at the end")
    ends, prompts = last["ferrum_request_success_total"], last["ferrum_request_prompt_tokens_count"]
    if ends != prompts or last["ferrum_generation_tokens_total"] != last["ferrum_request_generation_tokens_sum"]:
        found.append("the metrics of completions do not add up")
    if ends < seen["answers"] or last["ferrum_generation_tokens_total"] < seen["received tokens"]:
        found.append("the metrics have less than the clients received")
    if last["ferrum_prompt_tokens_total"] != last["ferrum_request_prompt_tokens_sum"]:
        found.append("the tokens of prompts do not add up")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(usage=f"\n{__doc__}")
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with served(asked.model, *SMALL) as server:
        report = asyncio.run(soak(server, asked.seconds, asked.clients, asked.seed))
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["faults"]) or report["memory_drift_percent"] > 2)


if __name__ == "__main__":
    main()
