"""`ferrum-jax bench-serve`: how fast a server is for many clients at once.

Each client is a thread with one connection at a time, and reads a stream of /v1/completions. What is counted is checked: the
server's usage of each request must be the tokens that were asked for, and the stream must not have more pieces than that and
one for the end.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import click

from ferrum_jax.cli import common

_TIMEOUT = 600  # seconds without a byte
_WORDS = ("iron", "copper", "gold", "tin", "lead", "zinc", "silver", "smith", "hammer", "fire", "stone", "river", "old")


@dataclasses.dataclass
class Sample:
    """What one request asked for, and what came back. Times are seconds since its start."""

    prompt: str
    max_tokens: int
    times: list[float] = dataclasses.field(default_factory=list)  # of each piece of text
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def made(self) -> int:
        return self.usage.get("completion_tokens", 0)


def _prompts(dataset: Path | None, prompt_tokens: int, count: int, seed: int) -> Iterator[str]:
    """Texts from a file (ShareGPT's JSON, or lines of JSON with "prompt"), or of random words, each about a token."""
    chosen = random.Random(seed)
    if dataset is None:
        for _ in range(count):
            yield " ".join(chosen.choices(_WORDS, k=prompt_tokens))
        return
    text = dataset.read_text(encoding="utf-8")
    with common.users_mistake(f"{dataset}: "):
        entries = (
            json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
        )
        found = [entry["prompt"] if "prompt" in entry else entry["conversations"][0]["value"] for entry in entries if entry]
    if not found:
        raise click.UsageError(f"{dataset}: has no prompts")
    yield from chosen.choices(found, k=count)


class _Client:
    """Sends requests to one server."""

    def __init__(self, url: str, model: str | None, key: str | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise click.UsageError(f"{url!r} is not the address of a server, such as http://127.0.0.1:8000")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        connection = self._kind(self._host, self._port, timeout=10)
        try:
            connection.request("GET", f"{self._path}/v1/models", headers=self._headers)
            return json.loads(connection.getresponse().read())["data"][0]["id"]
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise click.UsageError(f"{self._host}:{self._port or ''} does not answer as OpenAI's API: {error!r}") from None
        finally:
            connection.close()

    def ask(self, sample: Sample) -> None:
        """Sends a request and reads its stream."""
        body = {"model": self.model, "prompt": sample.prompt, "max_tokens": sample.max_tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True}
        begin = time.perf_counter()
        connection = self._kind(self._host, self._port, timeout=_TIMEOUT)
        try:
            connection.request("POST", f"{self._path}/v1/completions", json.dumps(body), self._headers)
            reply = connection.getresponse()
            if reply.status != 200:
                sample.error = f"status {reply.status}: {reply.read(500).decode(errors='replace')}"
                return
            self._read(reply, sample, begin)
        except (OSError, http.client.HTTPException, ValueError) as error:
            sample.error = repr(error)
        finally:
            connection.close()

    def _read(self, reply: http.client.HTTPResponse, sample: Sample, begin: float) -> None:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            found = json.loads(line[6:])
            if "error" in found:
                sample.error = str(found["error"])
                return
            if any(choice.get("text") for choice in found["choices"]):
                sample.times.append(time.perf_counter() - begin)
            sample.usage = found.get("usage") or sample.usage
        if sample.made != sample.max_tokens:
            sample.error = f"usage: {sample.made} tokens instead of {sample.max_tokens}"
        elif len(sample.times) > sample.made + 1:
            sample.error = f"{len(sample.times)} pieces for {sample.made} tokens"


def _send(ask: Callable[[Sample], None], samples: list[Sample], concurrency: int, rate: float | None) -> None:
    """Sends all requests: up to a number at once, or at random moments with a rate per second."""
    if rate is not None:
        moments, threads = random.Random(0), []
        for sample in samples:
            threads.append(threading.Thread(target=ask, args=(sample,), daemon=True))
            threads[-1].start()
            time.sleep(moments.expovariate(rate))
        for thread in threads:
            thread.join()
        return
    waiting: SimpleQueue[Sample] = SimpleQueue()
    for sample in samples:
        waiting.put(sample)

    def work() -> None:
        while True:
            try:
                sample = waiting.get_nowait()
            except Empty:
                return
            ask(sample)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _spread(seconds: list[float]) -> dict[str, float | None]:
    """Mean, median and 99th percentile in milliseconds."""
    if not seconds:
        return {"mean": None, "p50": None, "p99": None}
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    found = {"mean": statistics.fmean(ordered), "p50": statistics.median(ordered), "p99": p99}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def _report(samples: list[Sample], seconds: float) -> dict[str, Any]:
    good = [sample for sample in samples if not sample.error]
    between = [b - a for sample in good for a, b in zip(sample.times, sample.times[1:], strict=False)]
    made, read = (sum(sample.usage[key] for sample in good) for key in ("completion_tokens", "prompt_tokens"))
    return {
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "first_error": next((sample.error for sample in samples if sample.error), None),
        "seconds": round(seconds, 3),
        "prompt_tokens": read,
        "completion_tokens": made,
        "requests_per_second": common.rate(len(good), seconds),
        "completion_tokens_per_second": common.rate(made, seconds),
        "time_to_first_token_ms": _spread([sample.times[0] for sample in good if sample.times]),
        "time_between_pieces_ms": _spread(between),
        "time_of_a_request_ms": _spread([sample.times[-1] for sample in good if sample.times]),
        "tokens_equal_usage": len(good) == len(samples),
    }


@click.command("bench-serve", short_help="Measure a server with many clients.")
@click.argument("url")
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="Number of requests.")
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True, help="Requests at once.")
@click.option("--rate", type=common.FiniteRange(min=0, min_open=True), help="Requests a second instead, at random moments.")
@click.option(
    "--dataset", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help='Prompts: JSON as of ShareGPT, or lines with {"prompt": ...}. Default: random words.',
)  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Words of a random prompt.")
@click.option("--gen-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of each answer.")
@click.option("--model", metavar="NAME", help="Model to ask for. Default: the first one of the server.")
@click.option("--api-key", metavar="KEY", help="Key of the server.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@common.json_option
def bench_serve_command(url: str, requests: int, concurrency: int, rate: float | None, as_json: bool, **options: Any) -> None:
    """Measure the server at URL, any with OpenAI's /v1/completions: throughput, time to the first token, time between the
    pieces of a stream. End tokens are ignored, so that each answer has --gen-tokens tokens."""
    client = _Client(url, options["model"], options["api_key"])
    prompts = _prompts(options["dataset"], options["prompt_tokens"], requests, options["seed"])
    samples = [Sample(prompt, options["gen_tokens"]) for prompt in prompts]
    begin = time.perf_counter()
    _send(client.ask, samples, concurrency, rate)
    report = {"url": url, "model": client.model} | _report(samples, time.perf_counter() - begin)
    if as_json:
        common.print_json(report)
        return
    for name, value in report.items():
        shown = ", ".join(f"{key} {common.figure(part)}" for key, part in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name.replace('_', ' '):32}{shown}")
