"""What compilation costs, and what the second start of a program is spared.

    python -m benchmarks.compile_time [MODEL]

First the program of `functional.generate` for a Qwen3-MoE that exists only as shapes: layers of one format, 4 and 48 of
them, and 48 layers as llama.cpp's Q4_K_M mixes them; time should go with the number of distinct layer bodies. Then new
processes that load MODEL and print a token, with an empty compilation cache, and with the cache of that start.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.make_synthetic import more_bits
from ferrum_jax import functional, hub
from ferrum_jax.config import ModelConfig
from ferrum_jax.models.scan import layer_segments
from ferrum_jax.programs import COMPILER_OPTIONS
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.sampling import Sampling, SamplingParams
from pallas_kernels.blocks import FORMATS

ROUNDS = 3
PROMPT, TOKENS = 16, 16
SMALL = ModelConfig(
    architecture="qwen3moe",
    num_layers=4,
    hidden_size=256,
    intermediate_size=0,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1024,
    context_length=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_dim=64,
    num_experts=16,
    experts_per_token=4,
    expert_intermediate_size=256,
    norm_topk_prob=True,
)
FormatOf = Callable[[str, int], str]


def one_format(name: str, layer: int) -> str:
    return "Q4_K"


def q4_k_m(name: str, layer: int) -> str:
    """llama.cpp's recipe for 48 layers."""
    return "Q6_K" if name in ("value", "expert_down") and more_bits(layer, 48) else "Q4_K"


def shapes(config: ModelConfig, format_of: FormatOf) -> dict[str, Any]:
    """A Qwen3-MoE's parameters as `jax.ShapeDtypeStruct`s; `format_of(name, layer)` is the format of each matrix."""

    def tensor(format: str, *shape: int) -> QuantizedTensor:
        known = FORMATS[format]
        stored = (*shape[:-1], known.stored_width(shape[-1]))
        return QuantizedTensor.of(jax.ShapeDtypeStruct(stored, known.storage), format)

    def stack(name: str, *shape: int, format: str | None = None) -> LayerStack:
        layout = tuple(format or format_of(name, layer) for layer in range(config.num_layers))
        return LayerStack({kind: tensor(kind, layout.count(kind), *shape) for kind in sorted(set(layout))}, layout)

    hidden, experts, inner = config.hidden_size, config.num_experts, config.expert_intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "embedding": tensor("Q4_K", config.vocab_size, hidden),
        "unembedding": tensor("Q6_K", config.vocab_size, hidden),
        "final_norm": jax.ShapeDtypeStruct((hidden,), jnp.float32),
        "layers": {
            "attention_norm": stack("attention_norm", hidden, format="F32"),
            "feed_forward_norm": stack("feed_forward_norm", hidden, format="F32"),
            "attention": {
                "query": stack("query", queries, hidden),
                "key": stack("key", keys, hidden),
                "value": stack("value", keys, hidden),
                "output": stack("output", hidden, queries),
                "query_norm": stack("query_norm", config.head_dim, format="F32"),
                "key_norm": stack("key_norm", config.head_dim, format="F32"),
            },
            "feed_forward": {
                "router": stack("router", experts, hidden, format="F32"),
                "expert_gate": stack("expert_gate", experts, inner, hidden),
                "expert_up": stack("expert_up", experts, inner, hidden),
                "expert_down": stack("expert_down", experts, hidden, inner),
            },
        },
    }


def compile_once(config: ModelConfig, format_of: FormatOf) -> tuple[float, float, dict[str, int]]:
    """Seconds of tracing, seconds of XLA, and facts of the program: how many layer bodies, what it aliases."""
    jax.clear_caches()
    params = shapes(config, format_of)
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
    facts = {"bodies": sum(segment.period for segment in segments), "segments": len(segments)}
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
    """Seconds from starting a process to its first line, and the object that its second line, if any, holds."""
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
