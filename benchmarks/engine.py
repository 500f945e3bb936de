"""The engine on a CPU: requests together against one at a time and against llama.cpp's server, all in one run.

    python -m benchmarks.engine                    # SmolLM2-135M
    python -m benchmarks.engine MODEL.gguf --quick

Each part times two or more ways of doing the same work in turn and compares their medians; the results are checked in the same
run against this package's float32. All requests arrive at once, and times to the first token are counted from then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from benchmarks import common, make_synthetic
from benchmarks.cpu import check
from benchmarks.llama_cpp import LlamaCpp
from ferrum_jax import functional, hub
from ferrum_jax.engine.config import MAX_STEPS
from ferrum_jax.models.decoder import RaggedBatch
from ferrum_jax.state import KV_DTYPES, bytes_per_token

DTYPES = ("float32", "int8")
SLOTS = 16
PAGE = 16
SPECULATION = 4
SMALL = "qwen3-moe-tiny"


class Sizes(NamedTuple):
    """How much is measured: rounds; the longest prompt and output of `requests` requests; steps to time; the prompt that is
    repeated; tokens to generate with and without speculation; windows of text and their length for KV dtypes."""

    rounds: int = 3
    requests: int = 32
    prompt: int = 256
    output: int = 80
    steps: int = 40
    repeated: int = 1000
    speculated: int = 128
    windows: int = 8
    window: int = 240


QUICK = Sizes(rounds=1, requests=16, prompt=64, output=16, steps=10, speculated=64, windows=8, window=48)


class Ask(NamedTuple):
    prompt: list[int]
    tokens: int


class Answer(NamedTuple):
    """Token ids, and seconds from the beginning of all requests to this one's first token."""

    tokens: list[int]
    first: float


Serve = Callable[[list[Ask]], list[Answer]]


def greedy(tokens: int) -> fj.SamplingParams:
    return fj.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def make_requests(ids: list[int], sizes: Sizes, seed: int = 0) -> list[Ask]:
    """Passages from all over the text, with prompts and outputs of every length up to the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(16, sizes.prompt, sizes.requests, endpoint=True)
    starts = rng.integers(0, len(ids) - lengths)
    outputs = rng.integers(sizes.output // 8, sizes.output, sizes.requests, endpoint=True)
    return [Ask(ids[at : at + n], int(out)) for at, n, out in zip(starts, lengths, outputs, strict=True)]


def follow(engine: fj.Engine, requests: list[fj.Request], begin: float) -> list[Answer]:
    """Drives an engine until requests are finished."""
    first: dict[int, float] = {}
    while any(request.state != "finished" for request in requests):
        engine.step()
        now = time.perf_counter() - begin
        for request in requests:
            if request.id not in first and request.token_ids:
                first[request.id] = now
    return [Answer(request.token_ids, first[request.id]) for request in requests]


def together(engine: fj.Engine, asks: list[Ask], params: Callable[[int], fj.SamplingParams] = greedy) -> list[Answer]:
    """All requests at once; nothing is kept from earlier ones."""
    engine.reset()
    begin = time.perf_counter()
    return follow(engine, [engine.submit(ask.prompt, params(ask.tokens)) for ask in asks], begin)


def one_by_one(engine: fj.Engine, asks: list[Ask]) -> list[Answer]:
    """Each request starts when the one before has finished, so that nothing waits inside the engine."""
    engine.reset()
    begin = time.perf_counter()
    return [follow(engine, [engine.submit(ask.prompt, greedy(ask.tokens))], begin)[0] for ask in asks]


def through_server(peer: LlamaCpp, asks: list[Ask]) -> list[Answer]:
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(asks)) as threads:
        answers = list(threads.map(lambda ask: peer.stream(ask.prompt, ask.tokens), asks))
    return [Answer(tokens, first - begin) for tokens, first in answers]


def make_engine(model: Any, slots: int, context: int, **config: Any) -> fj.Engine:
    """An engine with pages for `slots` texts of `context` tokens and everything compiled."""
    pages = slots * -(-context // PAGE)
    engine = fj.Engine(model, fj.EngineConfig(page_size=PAGE, num_pages=pages, max_seqs=slots, **config))
    engine.warm_up()
    return engine


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(above) / statistics.median(below), 4)


# Throughput


def throughput(path: Path, models: dict[str, Any], asks: list[Ask], sizes: Sizes, threads: int) -> dict[str, Any]:
    context = sizes.prompt + sizes.output + PAGE
    total = sum(ask.tokens for ask in asks)
    times: dict[tuple, list[float]] = {}
    firsts: dict[tuple, list[list[float]]] = {}
    loads: dict[tuple, list[float]] = {}
    answers: dict[tuple, list[Answer]] = {}
    with LlamaCpp(path, threads=threads, context=context, slots=SLOTS) as peer:
        cases: dict[tuple, Serve] = {("llama.cpp", "int8 blocks", SLOTS): partial(through_server, peer)}
        for dtype, model in models.items():
            cases["ferrum_jax", dtype, 1] = partial(one_by_one, make_engine(model, 1, context))
            cases["ferrum_jax", dtype, SLOTS] = partial(together, make_engine(model, SLOTS, context))
        for run in cases.values():
            run([Ask(ask.prompt[:16], 4) for ask in asks[:2]])
        for number in range(sizes.rounds):
            for case, run in cases.items():
                seconds, others, got = common.sample(partial(run, asks), [peer.pid])
                times.setdefault(case, []).append(seconds)
                firsts.setdefault(case, []).append([answer.first for answer in got])
                loads.setdefault(case, []).append(others)
                answers[case] = got
                print(f"round {number + 1}: {case}: {total / seconds:.1f} tokens/s, others {others}", flush=True)
        build = peer.build
    exact = models["float32"]
    reference = [exact.generate([ask.prompt], greedy(sizes.output))[0].token_ids[: ask.tokens] for ask in asks]
    checked: dict[tuple, dict[str, Any]] = {}
    rows = []
    for case, seconds in times.items():
        engine, dtype, slots = case
        alone = times.get((engine, dtype, 1))
        row = {
            "engine": engine,
            "dtype": dtype,
            "slots": slots,
            "seconds": common.summary(seconds, 2),
            "output_tok_s": common.summary([total / one for one in seconds], 2),
            "first_token_s": common.summary([statistics.median(one) for one in firsts[case]]),
            "worst_first_token_s": common.summary([max(one) for one in firsts[case]]),
            "times_one_by_one": None if alone is None else ratio(alone, seconds),
            "other_cores": max(loads[case]),
            "content_check": check_all(exact, asks, [answer.tokens for answer in answers[case]], reference, checked),
        }
        rows.append(row)
    prompts = sum(len(ask.prompt) for ask in asks)
    return {"requests": len(asks), "prompt_tokens": prompts, "output_tokens": total, "llama_cpp_build": build, "rows": rows}


def check_all(
    exact: Any, asks: list[Ask], made: list[list[int]], reference: list[list[int]], known: dict[tuple, dict[str, Any]]
) -> dict[str, Any]:
    """How many requests have exactly the tokens of `reference` (float32, one request at a time), and how far any token lies
    below float32's best. `known`: a cache of earlier checks."""
    checks = []
    for i, (ask, tokens, expected) in enumerate(zip(asks, made, reference, strict=True)):
        key = i, *tokens
        if key not in known:
            known[key] = check(exact, ask.prompt, tokens, expected)
        checks.append(known[key])
    equal = sum(one["equal_tokens"] == one["tokens"] for one in checks)
    return {"requests": len(checks), "equal_requests": equal, "worst_gap": max(one["worst_gap"] for one in checks)}


# Host time of a step


@contextlib.contextmanager
def stopwatch(targets: dict[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Wall and CPU seconds of some methods' calls in this thread: {name: [wall, cpu]}."""
    spent = {name: [0.0, 0.0] for name in targets}

    def timed(name: str, method: Callable) -> Callable:
        def call(*args: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return method(*args)
            finally:
                spent[name][0] += time.perf_counter() - wall
                spent[name][1] += time.thread_time() - cpu

        return call

    for name, (owner, attribute) in targets.items():
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    try:
        yield spent
    finally:
        for owner, attribute in targets.values():
            delattr(owner, attribute)


def host_time(model: Any, name: str, ids: list[int], rows: int, dispatches: int, at_once: int | None) -> dict[str, Any]:
    """Host seconds of decode steps of `rows` rows, as the engine counts them, with `at_once` steps per dispatch (None: the
    engine chooses), and this thread's wall and CPU time by stage. The device computes on the same cores, so the host may have
    to wait for one."""
    tokens = 3 + dispatches * (at_once or MAX_STEPS)
    config = fj.EngineConfig(
        page_size=PAGE, num_pages=-(-(tokens + 32) // PAGE) * rows, max_seqs=rows, steps_per_dispatch=at_once
    )
    engine = fj.Engine(model, config)
    engine.warm_up()
    requests = [engine.submit(ids[8 * i : 8 * i + 16], greedy(tokens + 8)) for i in range(rows)]
    while not all(len(request.token_ids) > 2 for request in requests):
        engine.step()
    stages = {
        "schedule": (engine._scheduler, "next"),
        "launch": (engine._executor, "launch"),
        "take in": (engine, "_take_in"),
    }
    walls, hosts, steps = [], [], 0
    common.wait_for_quiet()
    load = common.Load()
    with stopwatch(stages) as spent:
        for _ in range(dispatches):
            before, begin = engine.metrics(), time.perf_counter()
            engine.step()
            wall, after = time.perf_counter() - begin, engine.metrics()
            if made := after["steps"] - before["steps"]:
                steps += made
                walls.append(wall / made)
                hosts.append((after["host_seconds"] - before["host_seconds"]) / made)
    others = round(load.cores(), 2)
    for request in requests:
        engine.abort(request)
    engine.run()
    row = {
        "model": name,
        "dtype": model.config.dtype,
        "rows": rows,
        "steps_a_dispatch": round(steps / len(walls), 1),
        "step_ms": common.summary([1e3 * wall for wall in walls], 2),
        "host_us": common.summary([1e6 * host for host in hosts], 0),
        "share_percent": round(100 * sum(hosts) / sum(walls), 2),
        "stages_us": {stage: [round(1e6 * part / steps) for part in parts] for stage, parts in spent.items()},
        "other_cores": others,
    }
    print(f"host: {row}", flush=True)
    return row


def host_times(models: dict[str, Any], name: str, ids: list[int], dispatches: int) -> list[dict[str, Any]]:
    """For the model, whose weights push the host's data out of the caches, and for one so small that the host never waits for
    the device."""
    found = [host_time(model, name, ids, rows, dispatches, 1) for model in models.values() for rows in (16, 32)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{SMALL}.gguf"
        make_synthetic.make(path, SMALL)
        small = fj.load(path, dtype="int8")
    ids = np.random.default_rng(0).integers(300, small.config.vocab_size, len(ids)).tolist()
    return found + [host_time(small, SMALL, ids, 32, dispatches, at_once) for at_once in (1, None)]


# The prefix cache


def prefix_cache(engine: fj.Engine, prompt: list[int], rounds: int) -> dict[str, Any]:
    """Time to the first token of a new prompt, and of the same prompt repeated."""
    times: dict[str, list[float]] = {"first": [], "repeated": []}
    loads, tokens, saved = [], [], 0
    for _ in range(rounds):
        engine.reset()
        before = engine.metrics()["prefix_saved_tokens"]
        for name, samples in times.items():
            load, begin = common.Load(), time.perf_counter()
            [answer] = follow(engine, [engine.submit(prompt, greedy(4))], begin)
            samples.append(answer.first)
            loads.append(round(load.cores(), 2))
            tokens.append(answer.tokens)
            print(f"prefix cache: {name} {answer.first:.4f} s", flush=True)
        saved = engine.metrics()["prefix_saved_tokens"] - before
    return {
        "prompt_len": len(prompt),
        "saved_tokens": saved,
        **{f"{name}_s": common.summary(samples, 4) for name, samples in times.items()},
        "repeated_of_first": ratio(times["repeated"], times["first"]),
        "other_cores": max(loads),
        "content_check": {"equal": all(one == tokens[0] for one in tokens)},
    }


# Speculation


def speculation(model: Any, ids: list[int], sizes: Sizes) -> list[dict[str, Any]]:
    """With and without drafts. Repetitive: a paragraph of the text, twice and the beginning a third time, which a greedy model
    continues to copy. Other: English at temperature 1."""
    context = 1024
    engines = {count: make_engine(model, 4, context, speculation=count) for count in (0, SPECULATION)}
    part = sizes.speculated + 32
    paragraphs = [ids[i * 400 : i * 400 + part] for i in range(4)]
    texts = {
        "repetitive": [Ask([*p, *p, *p[:16]], sizes.speculated) for p in paragraphs],
        "other": [Ask(p[:48], sizes.speculated) for p in paragraphs],
    }
    found = []
    for kind, asks in texts.items():
        for rows in (1, 4):

            def params(tokens: int, kind: str = kind) -> fj.SamplingParams:
                if kind == "repetitive":
                    return greedy(tokens)
                return fj.SamplingParams(max_tokens=tokens, temperature=1.0, seed=7, ignore_eos=True)

            times: dict[int, list[float]] = {count: [] for count in engines}
            tokens, loads = [], []
            for _ in range(sizes.rounds):
                for count, engine in engines.items():
                    seconds, others, answers = common.sample(partial(together, engine, asks[:rows], params))
                    times[count].append(seconds - max(answer.first for answer in answers))
                    tokens.append([answer.tokens for answer in answers])
                    loads.append(others)
            row = {
                "dtype": model.config.dtype,
                "text": kind,
                "rows": rows,
                "without_s": common.summary(times[0]),
                "with_s": common.summary(times[SPECULATION]),
                "faster": ratio(times[0], times[SPECULATION]),
                "other_cores": max(loads),
                "content_check": {"equal": all(one == tokens[0] for one in tokens)},
            }
            print(f"speculation: {row}", flush=True)
            found.append(row)
    return found


# KV dtypes


def teacher_forced(params, cache, ids, *, config):
    """Log-probabilities float32 [rows, length - 1] of ids int32 [rows, length], each row one token a step as in decoding:
    every step reads from the cache alone what the steps before it wrote."""
    rows, length = ids.shape
    pages = cache.num_pages // rows
    row = jnp.arange(rows, dtype=jnp.int32)

    def step(cache, position):
        batch = RaggedBatch(
            tokens=ids[:, position],
            positions=jnp.full(rows, position),
            slots=row * pages * cache.page_size + position,
            query_starts=jnp.arange(rows + 1, dtype=jnp.int32),
            kv_lengths=jnp.full(rows, position + 1),
            page_table=jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages),
            logits_rows=row,
        )
        logits, cache = functional.forward(params, cache, batch, config=config)
        return cache, jax.nn.log_softmax(logits)[row, ids[:, position + 1]]

    cache, found = jax.lax.scan(step, cache, jnp.arange(length - 1, dtype=jnp.int32))
    return cache, found.T


def kv_dtypes(model: Any, ids: list[int], sizes: Sizes) -> dict[str, Any]:
    """Perplexity of windows of the text, decoded with each dtype of the KV cache."""
    text = np.asarray(ids[: sizes.windows * sizes.window], np.int32).reshape(sizes.windows, sizes.window)
    pages = sizes.windows * -(-sizes.window // PAGE)
    rows: list[dict[str, Any]] = []
    exact = 0.0
    for dtype in KV_DTYPES:
        cache = functional.new_cache(model.config, num_pages=pages, page_size=PAGE, dtype=dtype)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / (pages * PAGE)
        begin = time.perf_counter()
        _, found = model._runtime.programs.run(teacher_forced, model.params, cache, text, donate=(1,), config=model.config)
        value = float(np.exp(-np.asarray(found, np.float64).mean()))
        if not np.isfinite(value):
            raise RuntimeError(f"KV dtype {dtype}: perplexity is {value}")
        computed = bytes_per_token(model.config, dtype)
        if size != computed:
            raise RuntimeError(f"KV dtype {dtype}: {size} bytes a token where {computed} were computed")
        exact = exact or value
        change = round(100 * (value / exact - 1), 4)
        rows.append({"dtype": dtype, "bytes_per_token": computed, "perplexity": round(value, 5), "change_percent": change})
        print(f"{rows[-1]} in {time.perf_counter() - begin:.1f} s", flush=True)
    prefill = model.perplexity(text.ravel().tolist(), window=sizes.window)
    difference = round(100 * (exact / prefill - 1), 5)
    scored = sizes.windows * (sizes.window - 1)
    return {
        "window": sizes.window,
        "scored_tokens": scored,
        "rows": rows,
        "content_check": {"float32_prefill": round(prefill, 5), "difference_percent": difference},
    }


def measure(path: Path, name: str, sizes: Sizes, only: Sequence[str]) -> dict[str, Any]:
    """The parts named in `only`, or all."""
    threads = len(os.sched_getaffinity(0))
    models = {dtype: fj.load(path, dtype=dtype) for dtype in DTYPES}
    exact = models["float32"]
    ids = exact.tokenizer.encode(common.TEXT.read_text(), add_special=False)
    asks = make_requests(ids, sizes)
    memory = exact.memory()
    shape = {"name": name, "architecture": exact.config.architecture, "parameter_bytes": memory["parameters_total"]}
    parts = {
        "throughput": lambda: throughput(path, models, asks, sizes, threads),
        "host": lambda: host_times(models, name, ids, sizes.steps),
        "prefix_cache": lambda: prefix_cache(make_engine(exact, 4, 1024), ids[: sizes.repeated], 2 * sizes.rounds + 1),
        "speculation": lambda: {
            "drafted": SPECULATION,
            "rows": [row for model in models.values() for row in speculation(model, ids, sizes)],
        },
        "kv_dtypes": lambda: kv_dtypes(exact, ids, sizes),
    }
    if unknown := set(only) - set(parts):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    return {"model": shape, "threads": threads} | {part: work() for part, work in parts.items() if not only or part in only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2:135m", help="a path, or anything that `load` takes")
    parser.add_argument("--name", help="what the model is called in the result; default: the model")
    parser.add_argument("--quick", action="store_true", help="a few minutes: one round of short requests, nothing is written")
    parser.add_argument("--rounds", type=int, default=Sizes().rounds, help="how often everything is repeated")
    parser.add_argument("--only", nargs="+", default=(), metavar="PART", help="measure these anew, keep the rest of the result")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to spend on waiting for a quiet machine")
    options = parser.parse_args()
    common.Patience.left = options.patience
    name = options.name or options.model.replace(":", "-")
    sizes = QUICK if options.quick else Sizes(rounds=options.rounds)
    result = measure(hub.resolve(options.model), name, sizes, options.only)
    if not options.quick:
        common.write("engine", result, "xllamacpp", keep=bool(options.only))


if __name__ == "__main__":
    main()
