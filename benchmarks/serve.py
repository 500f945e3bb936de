"""The server against the engine that is driven directly: the same requests in turn, with the same answers.

    python -m benchmarks.serve                              # SmolLM2-135M, int8, 16 and 64 streams
    python -m benchmarks.serve MODEL.gguf --slots 16 --rounds 5

The server is a process of its own, and the clients of a round are one thread here, which only keeps what arrives; it is read
afterwards. No prefix cache, so that each round computes the same.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ferrum_jax as fj
from benchmarks import common
from benchmarks.engine import Ask, Sizes, greedy, make_requests, ratio
from benchmarks.soak import Server, served
from ferrum_jax import hub


class Stream(NamedTuple):
    """What one connection received: the bytes, and the seconds since the beginning at which they arrived."""

    parts: list[bytes]
    times: list[float]

    def texts(self) -> list[tuple[float, str]]:
        """The pieces of text, and when they arrived."""
        found = []
        for part, at in zip(self.parts, self.times, strict=True):
            for line in part.split(b"\n"):
                if line.startswith(b"data: {"):
                    found += [(at, choice["text"]) for choice in json.loads(line[6:])["choices"] if choice["text"]]
        return found


def through_http(server: Server, asks: list[Ask], delay: float = 0.0) -> tuple[float, list[Stream]]:
    """Sends all requests, `delay` seconds apart, and reads all streams; seconds, and what was received."""
    chosen = selectors.DefaultSelector()
    streams = [Stream([], []) for _ in asks]
    begin, sent, open_ = time.perf_counter(), 0, 0
    while sent < len(asks) or open_:
        while sent < len(asks) and time.perf_counter() - begin >= sent * delay:
            connection = socket.create_connection(("127.0.0.1", server.port))
            body = {"prompt": asks[sent].prompt, "max_tokens": asks[sent].tokens, "temperature": 0, "ignore_eos": True}
            raw = json.dumps(body | {"stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            chosen.register(connection, selectors.EVENT_READ, streams[sent])
            sent, open_ = sent + 1, open_ + 1
        for key, _ in chosen.select(timeout=0.01 if sent < len(asks) else None):
            part = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if part:
                key.data.parts.append(part)
                key.data.times.append(time.perf_counter() - begin)
            else:
                chosen.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                open_ -= 1
    return time.perf_counter() - begin, streams


def spread(streams: list[Stream]) -> dict[str, float]:
    """Milliseconds: the median and the worst time to the first text, the median and 99th percentile between pieces of text."""
    times = [[at for at, _ in stream.texts()] for stream in streams]
    firsts = [found[0] for found in times]
    between = sorted(later - sooner for found in times for sooner, later in pairwise(found))
    middle, p99 = statistics.median(between), between[int(0.99 * len(between))]
    found = {"first_ms": statistics.median(firsts), "worst_first_ms": max(firsts), "between_ms": middle, "between_p99_ms": p99}
    return {name: round(1e3 * value, 1) for name, value in found.items()} | {"p99_of_median": round(p99 / middle, 2)}


def directly(engine: fj.Engine, asks: list[Ask]) -> tuple[float, list[str]]:
    """The same requests, in the engine: seconds, and texts."""
    begin = time.perf_counter()
    requests = [engine.submit(ask.prompt, greedy(ask.tokens)) for ask in asks]
    engine.run()
    return time.perf_counter() - begin, [request.text for request in requests]


def measure(path: Path, dtype: str, slots: int, rounds: int, delay: float) -> dict[str, Any]:
    sizes = Sizes(requests=2 * slots, prompt=512, output=128)
    model = fj.load(path, dtype=dtype)
    asks = make_requests(model.tokenizer.encode(common.TEXT.read_text(), add_special=False), sizes)
    pages = slots * -(-(sizes.prompt + sizes.output) // 16)
    engine = fj.Engine(model, fj.EngineConfig(page_size=16, num_pages=pages, max_seqs=slots, prefix_cache=False))
    engine.warm_up()
    engine.rehearse()
    flags = ("--dtype", dtype, "--no-prefix-cache", "--max-seqs", str(slots), "--num-pages", str(pages))
    times: dict[str, list[float]] = {"direct": [], "http": []}
    spreads, equal = [], True
    with served(str(path), *flags) as server:
        for number in range(rounds):
            common.wait_for_quiet()
            seconds, expected = directly(engine, asks)
            times["direct"].append(seconds)
            seconds, streams = through_http(server, asks, delay)
            times["http"].append(seconds)
            spreads.append(spread(streams))
            equal &= expected == ["".join(text for _, text in stream.texts()) for stream in streams]
            print(f"round {number + 1}: direct {times['direct'][-1]:.2f} s, http {seconds:.2f} s, {spreads[-1]}", flush=True)
    total = sum(ask.tokens for ask in asks)
    return {
        "model": path.stem,
        "dtype": dtype,
        "slots": slots,
        "requests": len(asks),
        "tokens": {"prompts": sum(len(ask.prompt) for ask in asks), "outputs": total},
        "direct_tok_s": common.summary([total / one for one in times["direct"]], 1),
        "http_tok_s": common.summary([total / one for one in times["http"]], 1),
        "http_of_direct": ratio(times["direct"], times["http"]),
        "http": {name: statistics.median(each[name] for each in spreads) for name in spreads[0]},
        "content_check": {"equal": equal},
    }


def main() -> None:
    parser = argparse.ArgumentParser(usage=f"\n{__doc__}")
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds between requests of clients; 0: all at once")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to spend on waiting for a quiet machine")
    asked = parser.parse_args()
    common.Patience.left = asked.patience
    path = hub.resolve(asked.model)
    for slots in asked.slots:
        print(json.dumps(measure(path, asked.dtype, slots, asked.rounds, asked.delay), indent=1), flush=True)


if __name__ == "__main__":
    main()
