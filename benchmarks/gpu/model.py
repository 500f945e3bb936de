"""Decode and prefill of the whole model, through the functions and compiled programs that users run.

A decode sample is one dispatch of several tokens (`functional.advance`), a prefill sample one `functional.start`. In addition
to the wall time, a row has the launches, kernel time and idle time of a step, from a profile of one such dispatch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import common
from benchmarks.gpu import trace, weights, whole
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sizes import goal
from ferrum_jax import functional
from ferrum_jax.models import layers
from ferrum_jax.models.decoder import RaggedBatch
from ferrum_jax.state import bytes_per_token
from ferrum_jax.weights.stream import bytes_by_format


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    run = Run(lab)
    one, many = 1, lab.sizes.batch
    yield "decode, batch 1", lambda: run.decode(one)
    yield "prefill", run.prefill
    yield f"decode, batch {many}", lambda: run.decode(many)
    yield "experts touched", run.experts
    yield "profile, batch 1", lambda: run.profile(one)
    yield f"profile, batch {many}", lambda: run.profile(many)
    yield "profile, prefill", run.profile_prefill
    yield "sampled decode, batch 1", lambda: run.sampled(one)
    yield f"sampled decode, batch {many}", lambda: run.sampled(many)


class Run:
    def __init__(self, lab: Lab):
        self.lab, self.config = lab, lab.sizes.config
        self.decodings: dict[int, whole.Decoding] = {}
        self.medians: dict[str, float] = {}  # seconds a step, or of a prefill
        self._params: Any = None

    @property
    def params(self):
        if self._params is None:
            self._params = jax.block_until_ready(weights.make(self.lab, self.config))
        return self._params

    def decoding(self, batch: int) -> whole.Decoding:
        if batch not in self.decodings:
            self.decodings[batch] = whole.Decoding(self.lab, self.params, self.config, batch)
        return self.decodings[batch]

    def decode(self, batch: int) -> Iterator[dict]:
        yield from measure_decode(self.lab, f"decode, batch {batch}", self.decoding(batch), self.medians)

    def sampled(self, batch: int) -> Iterator[dict]:
        decoding = self.decoding(batch)
        greedy, decoding.sampling = decoding.sampling, whole.sampling(self.lab, batch, temperature=0.8, top_p=0.95)
        yield from measure_decode(self.lab, f"decode, batch {batch}, temperature 0.8, top_p 0.95", decoding)
        decoding.sampling = greedy

    def start(self, chunk: int):
        """One prefill of the prompt: (cache, state, sampled)."""
        cache = self.lab.run(whole.empty_cache, config=self.config, tokens=self.lab.sizes.capacity)
        arguments = (self.params, cache, *whole.prompt(self.lab), whole.sampling(self.lab, 1), whole.KEY)
        return self.lab.run(functional.start, *arguments, donate=(1,), config=self.config, chunk=chunk)

    def prefill(self) -> Iterator[dict]:
        lab, prompt, chunk = self.lab, self.lab.sizes.prompt, self.lab.sizes.chunks[-1]
        taken = lab.seconds(lambda: self.start(chunk))
        cache, _, sampled = self.start(chunk)
        if lab.collecting:
            return
        rates = [prompt / seconds for seconds in taken]
        self.medians["prefill"] = statistics.median(taken)
        row = {"name": "prefill", "tokens": prompt, "chunk": chunk, "ms": round(1e3 * statistics.median(taken), 3)}
        row |= goal("prefill", statistics.median(rates), lab.sizes) | {"samples": common.summary(rates, 1)}
        # The prompt's last token again, as a decode step over the prefill's cache: the sampled token must rank high.
        token, last = int(np.asarray(sampled.tokens)[0, 0]), whole.prompt(lab)[0][:, -1]
        logits, _, _ = self.watch(cache, last, prompt - 1)
        rank = int((np.asarray(logits)[0] > np.asarray(logits)[0, token]).sum())
        yield row | {"check": {"token": token, "rank_when_decoded": rank, "ok": rank < 8 and np.isfinite(logits).all().item()}}

    def watch(self, cache, tokens, position: int) -> tuple[jax.Array, Any, list[int]]:
        """One decode step: logits, the cache, and the number of experts that each layer read."""
        batch, touched = len(tokens), []
        per_row = cache.num_pages // batch
        table = np.arange(batch * per_row, dtype=np.int32).reshape(batch, per_row)
        positions = np.full(batch, position, np.int32)
        inputs = RaggedBatch(
            tokens=tokens,
            positions=positions,
            slots=table[:, 0] * whole.PAGE + positions,
            query_starts=np.arange(batch + 1, dtype=np.int32),
            kv_lengths=positions + 1,
            page_table=table,
            logits_rows=np.arange(batch, dtype=np.int32),
        )
        with mock.patch(f"{__name__}.note", lambda ids: touched.append(len(np.unique(ids)))):
            run = self.lab.run(forward_watched, self.params, cache, inputs, donate=(1,), config=self.config)
            logits, cache = jax.block_until_ready(run)
            jax.effects_barrier()
        return logits, cache, touched

    def experts(self) -> Iterator[dict]:
        """How many experts each layer reads in a decode step, counted from the router's choices."""
        lab, config = self.lab, self.config
        if lab.collecting:
            return  # a program that calls the host is not timed
        for batch in (1, lab.sizes.batch):
            decoding = self.decoding(batch)
            _, decoding.cache, touched = self.watch(decoding.cache, decoding.state.token, lab.sizes.context)
            weights_read = active_bytes(self.params, config, statistics.mean(touched))
            row = {"name": f"experts touched, batch {batch}", "value": statistics.mean(touched), "unit": "of a layer"}
            row |= {"least": min(touched), "most": max(touched), "layers": len(touched), "weight_bytes": weights_read}
            kv = lab.sizes.context * batch * bytes_per_token(config, config.dtype)
            yield row | {"kv_bytes": kv, "check": {"ok": len(touched) == config.num_layers}}

    def profile(self, batch: int) -> Iterator[dict]:
        decoding, count = self.decoding(batch), self.lab.sizes.steps
        if self.lab.collecting:
            return
        name = f"decode, batch {batch}"
        found = trace.record(decoding.step)
        yield {"name": f"profile of {name}", "of": "step"} | trace.summary(found, count, self.medians.get(name, 0.0))

    def profile_prefill(self) -> Iterator[dict]:
        if self.lab.collecting:
            return
        found = trace.record(lambda: self.start(self.lab.sizes.chunks[-1]))
        yield {"name": "profile of prefill", "of": "prompt"} | trace.summary(found, 1, self.medians.get("prefill", 0.0))


def measure_decode(lab: Lab, name: str, decoding: whole.Decoding, medians: dict[str, float] | None = None) -> Iterator[dict]:
    """A row of decode speed; `medians` gets the seconds of a step."""
    taken = lab.seconds(decoding.step)
    if lab.collecting:
        return
    sizes = lab.sizes
    rates = [decoding.batch * sizes.steps / seconds for seconds in taken]
    step_s = statistics.median(taken) / sizes.steps
    if medians is not None:
        medians[name] = step_s
    rate = statistics.median(rates)
    standard = f"decode, batch {decoding.batch}"
    row = {"name": name, "batch": decoding.batch, "context": sizes.context, "ms": round(1e3 * step_s, 4)}
    row |= goal(standard, rate, sizes) if name == standard and sizes.real else {"value": rate, "unit": "tokens/s"}
    row |= {"samples": common.summary(rates, 1)}
    yield row | {"memory": temporaries(lab, decoding), "check": decoding.content()}


def temporaries(lab: Lab, decoding: whole.Decoding) -> dict[str, int]:
    """Bytes of the compiled step: temporaries, results, and how much of the results reuses donated arguments."""
    static = {"config": decoding.config, "steps": lab.sizes.steps}
    program = lab.program(functional.advance, *decoding.arguments(), donate=(1,), **static)
    found = program.compiled.memory_analysis()
    return {"temp": found.temp_size_in_bytes, "alias": found.alias_size_in_bytes, "output": found.output_size_in_bytes}


def active_bytes(params: dict, config, experts: float) -> int:
    """Bytes of weights that a step reads: everything but the embedding, with only `experts` experts in each layer."""
    whole_bytes = sum(bytes_by_format({key: value for key, value in params.items() if key != "embedding"}).values())
    feed_forward = params["layers"]["feed_forward"]
    stacks = {name: stack for name, stack in feed_forward.items() if name.startswith("expert_")}
    all_experts = sum(bytes_by_format(stacks).values())
    return round(whole_bytes - all_experts * (1 - experts / config.num_experts))


def note(ids: np.ndarray) -> None:
    """Called with the experts of each layer while `forward_watched` runs; patched to count them."""


# Programs


def forward_watched(params, cache, batch: RaggedBatch, *, config):
    """functional.forward that calls `note` with the experts that its router chooses."""
    route = layers.route

    def watched(*args, **keywords):
        ids, values = route(*args, **keywords)
        jax.debug.callback(lambda ids: note(ids), ids)
        return ids, values

    with mock.patch.object(layers, "route", watched):
        return functional.forward(params, cache, batch, config=config)
