"""What compilation costs, and how much of it the second start of a program saves.

    python -m benchmarks.compile_time [MODEL]

First the program of `functional.generate` for a Qwen3-MoE that exists only as shapes: layers of one format, 4 and 48 of them,
and 48 layers as llama.cpp's Q4_K_M mixes them; time should grow with the number of distinct layer bodies. Then new processes
load MODEL and print a token: first with an empty compilation cache, then with the cache that the first one filled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.gpu import sizes
from benchmarks.tensors import FormatOf, q4_k_m, shapes
from ferrum_jax import functional, hub
from ferrum_jax.config import ModelConfig
from ferrum_jax.models.scan import layer_segments
from ferrum_jax.programs import COMPILER_OPTIONS
from ferrum_jax.sampling import Sampling, SamplingParams
from pallas_kernels import dispatch

ROUNDS = 3
PROMPT, TOKENS = 16, 16
SMALL = dataclasses.replace(
    sizes.SMALL.config, num_layers=4, vocab_size=1024, context_length=4096, num_experts=16, experts_per_token=4, dtype="float32"
)


def one_format(name: str, layer: int | None, config: ModelConfig) -> str:
    """Q4_K, and Q6_K of the output matrix, which does not belong to a layer."""
    return "Q6_K" if name == "unembedding" else "Q4_K"


def compile_once(config: ModelConfig, format_of: FormatOf) -> tuple[float, float, dict[str, int]]:
    """Seconds of tracing, seconds in XLA, and facts about the program: how many layer bodies, what it aliases."""
    jax.clear_caches()
    params = shapes(config, dispatch.Target("cpu"), format_of)
    new_cache = functools.partial(functional.new_cache, config, num_pages=(PROMPT + TOKENS) // 16)
    cache = jax.eval_shape(new_cache)
    sampling = Sampling.from_params(
        [SamplingParams(temperature=0.0, max_tokens=TOKENS)],
        eos_ids=[0],
        vocab_limit=config.vocab_size,
        pad_to=1,
        default_seeds=[0],
    )
    inputs = (params, cache, np.zeros((1, PROMPT), np.int32), np.full(1, PROMPT, np.int32), sampling, np.zeros(2, np.uint32))
    program = jax.jit(functools.partial(functional.generate, config=config, max_tokens=TOKENS), donate_argnums=1)
    start = time.perf_counter()
    lowered = program.lower(*inputs)
    traced = time.perf_counter()
    compiled = lowered.compile(COMPILER_OPTIONS.get(jax.default_backend()))  # as the package compiles
    end = time.perf_counter()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    alias_bytes = compiled.memory_analysis().alias_size_in_bytes
    if alias_bytes < cache_bytes:
        raise RuntimeError(f"the program aliases {alias_bytes} bytes of a cache of {cache_bytes}")
    segments = layer_segments(params["layers"])
    facts = {"bodies": sum(len(segment.runs) for segment in segments), "segments": len(segments)}
    return traced - start, end - traced, facts | {"cache_bytes": cache_bytes, "alias_bytes": alias_bytes}


def by_depth() -> list[dict[str, Any]]:
    jax.config.update("jax_enable_compilation_cache", False)
    cases = {
        "4 layers, Q4_K": (SMALL, one_format),
        "48 layers, Q4_K": (dataclasses.replace(SMALL, num_layers=48), one_format),
        "48 layers, Q4_K_M": (dataclasses.replace(SMALL, num_layers=48), q4_k_m),
    }
    compile_once(dataclasses.replace(SMALL, num_layers=2), one_format)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    loads: dict[str, list[float]] = {name: [] for name in cases}
    facts = {}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            _, others, (tracing, xla, facts[name]) = common.sample(functools.partial(compile_once, *case))
            samples[name].append((tracing, xla))
            loads[name].append(others)
            print(f"{name}: {tracing:.2f} s + {xla:.2f} s, others {others}", flush=True)
    return [
        {
            "program": name,
            **facts[name],
            "tracing_s": common.summary([tracing for tracing, _ in taken]),
            "xla_s": common.summary([xla for _, xla in taken]),
            "compile_s": common.summary([tracing + xla for tracing, xla in taken]),
            "other_cores": max(loads[name]),
        }
        for name, taken in samples.items()
    ]


FIRST_TOKEN = """
import json, sys
import ferrum_jax as fj
model = fj.load(sys.argv[1])
stream = model.stream("Iron is", fj.SamplingParams(max_tokens=8, temperature=0.0))
next(stream)
print("first token", flush=True)
for _ in stream:
    pass
timings = model.timings()
print(json.dumps({"tokens": stream.token_ids, "load_s": timings["load_s"], "compile_s": timings["compile_s"]}))
"""
EMPTY = """
import jax
jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)).block_until_ready()
print("done", flush=True)
"""


def start_once(code: str, environment: dict[str, str], *arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds from starting a process to its first line of output, and the object on its second line, if any."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as child:
        if not child.stdout.readline():
            raise RuntimeError(f"a starting process failed with exit code {child.wait()}")
        seconds = time.perf_counter() - begin
        rest = child.stdout.read()
    return seconds, json.loads(rest) if rest else {}


def starts(path: Path, rounds: int = 3) -> dict[str, Any]:
    """First and second start with a separate compilation cache, compared with a process that only imports jax and runs x +
    1."""
    samples: dict[str, list[tuple[float, dict[str, Any]]]] = {"empty": [], "first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, taken in samples.items():
                common.wait_for_quiet()
                code, arguments = (EMPTY, ()) if name == "empty" else (FIRST_TOKEN, (str(path),))
                taken.append(start_once(code, {"XDG_CACHE_HOME": folder}, *arguments))
                print(f"{name}: {taken[-1][0]:.2f} s {taken[-1][1]}", flush=True)
    answers = [found["tokens"] for name in ("first", "second") for _, found in samples[name]]
    rows = []
    for name, taken in samples.items():
        row = {"start": name, "first_token_s": common.summary([seconds for seconds, _ in taken])}
        if name != "empty":
            row |= {key: common.summary([found[key] for _, found in taken]) for key in ("load_s", "compile_s")}
        rows.append(row)
    equal = all(answer == answers[0] for answer in answers)
    return {"rows": rows, "content_check": {"tokens": len(answers[0]), "equal": equal}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--name", help="what the model is called in the result; default: the argument")
    options = parser.parse_args()
    second = starts(hub.resolve(options.model))
    result = {"programs": by_depth(), "model": options.name or options.model, "starts": second}
    common.write("compile_time", result)


if __name__ == "__main__":
    main()
