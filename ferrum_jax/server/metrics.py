"""GET /metrics: Prometheus metrics with the meanings that vLLM gives them, under the prefix `ferrum_`.

What happens to completions is observed when they end; what the engine counts is read from it at each request.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ferrum_jax.engine import Engine, Request

_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = tuple(float(1 << power) for power in range(18))
_COUNTERS = {  # the engine's counts by name, and what they are
    "prefix_cache_queries": ("prompt_tokens", "prefix_saved_tokens", "tokens of prompts that were looked up"),
    "prefix_cache_hits": ("prefix_saved_tokens", None, "tokens of prompts that were not computed"),
    "num_preemptions": ("preemptions", None, "requests that had to give back their pages and were computed again"),
    "prompt_tokens_computed": ("prompt_tokens", None, "tokens of prompts that were computed"),
    "compiled_programs": ("compiles", None, "programs that were compiled"),
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine, model: str):
        self.registry = CollectorRegistry()
        self._model = model
        self.registry.register(_OfEngine(engine, model))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            kept = Histogram(f"ferrum_{name}", what, ["model_name"], buckets=buckets, registry=self.registry)
            return kept.labels(model)

        self._first = histogram("time_to_first_token_seconds", "from the arrival of a request to its first token", _LONG)
        self._between = histogram("inter_token_latency_seconds", "between tokens that arrive one after the other", _SHORT)
        self._mean = histogram("request_time_per_output_token_seconds", "mean time between tokens of a completion", _SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "from the arrival of a request to its last token", _LONG)
        self._queued = histogram("request_queue_time_seconds", "from the arrival of a request to its admission", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "from the admission of a request to its first token", _LONG)
        self._decode = histogram("request_decode_time_seconds", "from the first token to the last", _LONG)
        self._prompt = histogram("request_prompt_tokens", "tokens of a prompt", _TOKENS)
        self._made = histogram("request_generation_tokens", "tokens of a completion", _TOKENS)
        counters = {"registry": self.registry, "labelnames": ["model_name"]}
        self._prompts = Counter("ferrum_prompt_tokens", "tokens of prompts", **counters).labels(model)  # type: ignore[arg-type]
        self._tokens = Counter("ferrum_generation_tokens", "generated tokens", **counters).labels(model)  # type: ignore[arg-type]
        self._ends = Counter(
            "ferrum_request_success", "completions by their end", ["model_name", "finished_reason"], registry=self.registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return generate_latest(self.registry)

    def paused(self, seconds: float) -> None:
        """Counts the time between tokens of a completion that arrived one after the other."""
        self._between.observe(seconds)

    def ended(self, request: Request) -> None:
        """Counts a completion that has ended."""
        times, made, prompt = request.times, len(request.token_ids), len(request.prompt_token_ids)
        self._ends.labels(self._model, request.finish_reason or "").inc()
        self._prompts.inc(prompt)
        self._tokens.inc(made)
        self._prompt.observe(prompt)
        self._made.observe(made)
        if not made:
            return
        self._queued.observe(times.admitted - times.arrived)
        self._first.observe(times.first_token - times.arrived)
        self._prefill.observe(times.first_token - times.admitted)
        self._decode.observe(times.last_token - times.first_token)
        self._whole.observe(times.last_token - times.arrived)
        if made > 1:
            self._mean.observe((times.last_token - times.first_token) / (made - 1))


class _OfEngine:
    """Reads the engine's metrics when they are asked for."""

    def __init__(self, engine: Engine, model: str):
        self._engine, self._model = engine, model

    def describe(self) -> list[Metric]:
        return []  # otherwise the registry would ask the engine when this is registered

    def collect(self) -> Iterator[Metric]:
        found = self._engine.metrics()
        used = 1 - (found["pages_free"] + found["pages_cached"]) / self._engine.num_pages
        gauges = {
            "num_requests_running": (found["requests_running"], "completions that run"),
            "num_requests_waiting": (found["requests_waiting"], "completions that wait"),
            "kv_cache_usage_perc": (used, "the part of the pages that is in use, 0 to 1"),
        }
        for name, (value, what) in gauges.items():
            gauge = GaugeMetricFamily(f"ferrum_{name}", what, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (first, second, what) in _COUNTERS.items():
            counter = CounterMetricFamily(f"ferrum_{name}", what, labels=["model_name"])
            counter.add_metric([self._model], found[first] + (found[second] if second else 0))
            yield counter
