"""Prefill and decode on a CPU against llama.cpp: same file, same token ids, interleaved in one run.

    python -m benchmarks.cpu                       # SmolLM2-135M
    python -m benchmarks.cpu MODEL.gguf --name qwen2.5-coder-0.5b
    python -m benchmarks.cpu --synthetic qwen3-moe-600m

    python -m benchmarks.cpu --synthetic qwen35-moe-1g --dtypes int8 --llama-bench BUILD/bin/llama-bench

For every engine the same clock runs around the same requests: generating one token after the prompt is prefill; the further
time that `--generate` tokens take is decoding. llama.cpp is that of the `xllamacpp` wheel, if it is installed; a build given by
--llama-bench is measured as well, by its own llama-bench, and by the llama-batched-bench in the same folder if there is one.
The timed tokens are then checked against this package in float32, teacher-forced.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ferrum_jax as fj
from benchmarks import common, make_synthetic
from benchmarks.llama_cpp import LlamaCpp
from ferrum_jax import hub

DTYPES = ("float32", "bfloat16", "int8")
PACKAGE = "xllamacpp"  # llama.cpp as a wheel
Run = Callable[[list[list[int]], int], list[list[int]]]


def ours(model: Any) -> Run:
    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = fj.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return [completion.token_ids for completion in model.generate(prompts, params)]

    return run


def make_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Runs of English of `length` tokens, from places spread over the text."""
    ids = tokenizer.encode(common.TEXT.read_text())
    ids = ids * -(-2 * length // len(ids))
    step = (len(ids) - length) // count
    return [ids[step * i : step * i + length] for i in range(count)]


def check(exact: Any, prompt: list[int], tokens: list[int], reference: list[int]) -> dict[str, Any]:
    """How `tokens`, generated after `prompt`, compare with float32.

    equal_tokens: how many at the start are the same as in float32; gap_at_parting: how far the first different token lies below
    the best one in float32's logits; worst_gap: the largest such gap over all tokens, each after the ones before it.
    """
    [logits] = exact.logits([[*prompt, *tokens[:-1]]])
    rows = logits[len(prompt) - 1 :, : exact.tokenizer.vocab_size]
    if not np.isfinite(rows).all():
        raise RuntimeError("content check: float32 logits are not finite")
    gaps = rows.max(-1) - rows[np.arange(len(tokens)), tokens]
    equal = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b), len(tokens))
    parting = round(float(gaps[equal]), 4) if equal < len(tokens) else None
    found = {"tokens": len(tokens), "equal_tokens": equal, "gap_at_parting": parting}
    return found | {"worst_gap": round(float(gaps.max()), 4)}


class Native:
    """A native build's llama-bench, and its results in each round: tokens per second by (test, batch). It decodes from an empty
    context, llama-batched-bench after the prompt."""

    def __init__(self, program: Path, path: Path, threads: int, prompt_len: int, gen_len: int, batches: list[int]):
        self.sizes = prompt_len, gen_len, batches
        self.common = ["-m", str(path), "-t", str(threads)]
        self.program, self.batched = program, program.with_name("llama-batched-bench")
        self.rates: dict[tuple[str, int], list[float]] = {}

    def round(self) -> None:
        prompt, tokens, batches = self.sizes
        beside = self.batched.exists()
        command = [
            str(self.program),
            *self.common,
            "-p",
            str(prompt),
            "-n",
            str(0 if beside else tokens),
            "-r",
            "1",
            "-o",
            "json",
        ]
        for row in json.loads(self._say(command)):
            self._keep("decode" if row["n_gen"] else "prefill", 1, row["avg_ts"])
        if not beside:
            return
        rows = [1, *batches]
        size = ["-c", str(max(rows) * (prompt + tokens) + 256), "-npp", str(prompt), "-ntg", str(tokens)]
        parallel = ["-npl", ",".join(map(str, rows)), "--output-format", "jsonl"]
        for line in self._say([str(self.batched), *self.common, *size, *parallel]).splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                self._keep("decode", row["pl"], row["speed_tg"])

    def _say(self, command: list[str]) -> str:
        common.wait_for_quiet()
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _keep(self, test: str, batch: int, rate: float) -> None:
        self.rates.setdefault((test, batch), []).append(rate)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for batch in sorted({batch for _, batch in self.rates}):
            found = {f"{test}_tok_s": common.summary(self.rates[test, batch], 2) for test, at in self.rates if at == batch}
            rows.append({"batch": batch} | found)
        return rows


def load(path: Path, dtypes: list[str]) -> dict[str, Any]:
    """The model in some dtypes and in float32, with the same weights in memory."""
    models = {dtype: fj.load(path, dtype=dtype) for dtype in dtypes[-1:]}
    (first,) = models.values()
    for dtype in {*dtypes, "float32"} - models.keys():
        config, kv_dtype = dataclasses.replace(first.config, dtype=dtype), "float32" if dtype == "float32" else first.kv_dtype
        models[dtype] = fj.Model(config, first.params, first.tokenizer, jax.devices()[0], kv_dtype, first.max_seq_len)
    return models


def measure(
    path: Path,
    name: str,
    *,
    rounds: int,
    prompt_len: int,
    gen_len: int,
    batches: list[int],
    dtypes: list[str],
    llama_bench: Path | None,
) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    models = load(path, dtypes)
    exact = models["float32"]
    prompts = make_prompts(exact.tokenizer, max(batches, default=1), prompt_len)
    native = Native(llama_bench, path, threads, prompt_len, gen_len, batches) if llama_bench else None
    with contextlib.ExitStack() as stack:
        cases: list[tuple[str, str, int, Run]] = [("ferrum_jax", dtype, 1, ours(models[dtype])) for dtype in dtypes]
        cases += [("ferrum_jax", "int8", rows, ours(models["int8"])) for rows in batches if "int8" in dtypes]
        peer = None
        if importlib.util.find_spec(PACKAGE):
            peer = stack.enter_context(LlamaCpp(path, threads=threads, context=prompt_len + gen_len + 16))
            cases.insert(0, ("llama.cpp", "int8 blocks", 1, lambda p, n: [peer.generate(p[0], n)]))
        pids = [peer.pid] if peer else []
        times: dict[tuple, list[tuple[float, float]]] = {case: [] for case in cases}
        answers: dict[tuple, list[list[int]]] = {}
        loads: dict[tuple, list[float]] = {case: [] for case in cases}
        for engine, _, count, run in cases:
            for tokens in (1, gen_len) if engine == "ferrum_jax" else (1,):  # compiles
                run(prompts[:count], tokens)
        for number in range(rounds):
            if native:
                native.round()
            for case in cases:
                run, asked = case[3], prompts[: case[2]]
                first, others, _ = common.sample(partial(run, asked, 1), pids)
                whole, more, answer = common.sample(partial(run, asked, gen_len), pids)
                times[case].append((first, whole - first))
                loads[case].extend((others, more))
                answers[case[:3]] = answer
                taken = f"{first:.3f} s + {whole - first:.3f} s, others {others}, {more}"
                print(f"round {number + 1}: {' '.join(map(str, case[:3]))}: {taken}", flush=True)
    reference = answers.get(("ferrum_jax", "float32", 1)) or ours(exact)(prompts[:1], gen_len)
    rows = []
    for case in cases:
        engine, dtype, count, _ = case
        row = {
            "engine": engine,
            "dtype": dtype,
            "batch": count,
            "prefill_tok_s": common.summary([count * prompt_len / first for first, _ in times[case]], 2),
            "decode_tok_s": common.summary([count * (gen_len - 1) / rest for _, rest in times[case]], 2),
            "other_cores": max(loads[case]),
            "content_check": check(exact, prompts[0], answers[case[:3]][0], reference[0]),
        }
        rows.append(row)
    return {
        "model": {
            "name": name,
            "architecture": exact.config.architecture,
            "parameter_bytes": exact.memory()["parameters_total"],
            "formats": exact.memory()["parameters"],
        },
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "threads": threads,
        "llama_cpp_build": peer.build if peer else None,
        "rows": rows,
        "native": native.rows() if native else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2:135m", help="a path, or anything that `load` takes")
    parser.add_argument("--name", help="what the result is called; default: the model")
    parser.add_argument("--synthetic", choices=make_synthetic.SHAPES, help="make this model and measure it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--llama-bench", type=Path, help="of a build of llama.cpp to measure as well")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to spend on waiting for a quiet machine")
    options = parser.parse_args()
    common.Patience.left = options.patience
    with tempfile.TemporaryDirectory() as folder:
        if options.synthetic:
            path = Path(folder) / f"{options.synthetic}.gguf"
            make_synthetic.make(path, options.synthetic)
        else:
            path = hub.resolve(options.model)
        name = options.name or options.synthetic or options.model.replace(":", "-")
        sizes = {"prompt_len": options.prompt_len, "gen_len": options.generate, "batches": options.batch}
        sizes["dtypes"] = list(options.dtypes)
        result = measure(path, name, rounds=options.rounds, llama_bench=options.llama_bench, **sizes)
    common.write(f"cpu-{name}", result, *[PACKAGE] * bool(result["llama_cpp_build"]))


if __name__ == "__main__":
    main()
