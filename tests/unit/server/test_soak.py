"""What the benchmarks of the server check: a short soak through a real process (FERRUM_JAX_SOAK_SECONDS makes it longer), and
streams that are read as they arrive."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest

import ferrum_jax as fj
from benchmarks import serve, soak
from support.live_server import Live

SECONDS = float(os.environ.get("FERRUM_JAX_SOAK_SECONDS", "10"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_a_server_survives_its_clients() -> None:
    with soak.served("tiny", "--dtype", "float32", *soak.SMALL) as server:
        report = asyncio.run(soak.soak(server, SECONDS, clients=32 if SECONDS < 60 else 64, seed=0))
    print(report)
    assert report["faults"] == []
    assert report["seen"]["answers"] > 20 and report["seen"]["left"] > 5 and report["seen"]["rubbish"] > 5
    assert report["memory_drift_percent"] <= (2 if SECONDS >= 600 else 15)


def test_streams_have_the_texts_of_the_engine(server: Live, engine: fj.Engine) -> None:
    asks = [serve.Ask([5, 6, 7], 6), serve.Ask(list(range(5, 40)), 9)]
    expected = [engine.submit(ask.prompt, serve.greedy(ask.tokens)).result().text for ask in asks]
    seconds, streams = serve.through_http(soak.Server(server.port, os.getpid()), asks)
    assert ["".join(text for _, text in stream.texts()) for stream in streams] == expected
    found = serve.spread(streams)
    assert (
        0 < found["between_ms"] <= found["between_p99_ms"] <= 1e3 * seconds >= found["worst_first_ms"] >= found["first_ms"] > 0
    )


def test_what_does_not_hold_is_told() -> None:
    good = dict.fromkeys(
        (f"ferrum_{name}" for name in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success_total",
            "request_prompt_tokens_count", "generation_tokens_total", "request_generation_tokens_sum", "prompt_tokens_total",
            "request_prompt_tokens_sum",
        )),
        0.0,
    )  # fmt: skip
    assert soak.faults(Counter(), good) == []
    for seen, wrong in [
        ({"status 500": 1}, {}), ({"lost conversations": 1}, {}), ({"received tokens": 1}, {}), ({"answers": 1}, {}),
        *(({}, {name: 1.0}) for name in good if "answers" not in name),
    ]:  # fmt: skip
        assert soak.faults(Counter(seen), good | wrong), (seen, wrong)
