"""Compiles the whole steps of Qwen3-30B-A3B (Q4_K_M, real shapes, no weights) for one target.

    python -m support.aot.steps TARGET

prints one JSON object: for each step the memory of its program and the chosen backends. A separate process, because a compiler
may abort.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from ferrum_jax import functional as F
from ferrum_jax import headers
from ferrum_jax.distributed import Placement
from ferrum_jax.engine import steps as engine
from ferrum_jax.loading import auto_dtype
from ferrum_jax.programs import COMPILER_OPTIONS
from ferrum_jax.sampling import Sampling
from ferrum_jax.state import new_state
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels import aot, dispatch

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

CONTEXT = 4096
# name: tokens of the step, sequences
STEPS = {"decode of 1": (1, 1), "decode of 8": (8, 8), "prefill of 512": (512, 1)}
ENGINES = ("t4", "h200", "v5e")  # for which the engine's steps are compiled
SHORTER = {"v5e": 36}  # layers, where 48 do not fit
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_CONTROL = {"while", "conditional", "call"}


def main(target: str) -> None:
    header = headers.bundled("qwen3:30b-a3b")
    kind = aot.TARGETS[target].target
    if target in SHORTER:
        shorten(header, SHORTER[target])
    config = dataclasses.replace(header.config(), dtype=auto_dtype(kind))
    params = abstract_parameters(parameters(header, config), Placement.abstract(kind))
    report = {"dtype": config.dtype, "hidden": config.hidden_size, "vocab": config.vocab_size, "steps": {}}
    report["top_k"], report["width"] = config.experts_per_token, config.expert_intermediate_size
    report["q_width"] = config.num_heads * config.head_dim
    for name, (tokens, sequences) in STEPS.items():
        with dispatch.on(kind):
            make = functools.partial(F.new_cache, config, num_pages=sequences * CONTEXT // 16, dtype=config.dtype)
            cache = jax.eval_shape(make)
        i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        batch = F.RaggedBatch(
            *(i32((tokens,)) for _ in range(3)), i32((sequences + 1,)), i32((sequences,)),
            i32((sequences, CONTEXT // 16)), i32((sequences,)),
        )  # fmt: skip
        begin = time.perf_counter()
        with dispatch.record() as choices:
            step = functools.partial(F.forward, config=config)
            options = COMPILER_OPTIONS.get("gpu" if target in aot.GPUS else "tpu")
            compiled = aot.compile_for(target, step, params, cache, batch, donate_argnums=1, compiler_options=options)
        memory = compiled.memory_analysis()
        report["steps"][name] = {
            "tokens": tokens,
            "sequences": sequences,
            "compile_s": time.perf_counter() - begin,
            "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "choices": [dataclasses.asdict(choice) for choice in choices],
            "launches": launches(compiled.as_text()) if target in aot.GPUS else None,
        }
    if target in ENGINES:
        shorten(header, 4)
        report["engine"] = dict(engine_steps(target, header.config(), header))
    json.dump(report, sys.stdout)


def engine_steps(target: str, config, header):
    """The memory of the engine's steps, with four layers: (name, bytes)."""
    kind = aot.TARGETS[target].target
    config = dataclasses.replace(config, dtype=auto_dtype(kind))
    params = abstract_parameters(parameters(header, config), Placement.abstract(kind))
    slots, pages, rows = 32, 128, 8
    with dispatch.on(kind):
        sizes = {"pages": slots * pages, "page_size": 16, "dtype": config.dtype}
        cache = jax.eval_shape(functools.partial(new_state, config, **sizes))
    sampling = Sampling.from_params([], eos_ids=[1], vocab_limit=config.vocab_size, pad_to=slots, default_seeds=[])
    state = jax.eval_shape(lambda: engine.new_slots(sampling, slots=slots, capacity=pages * 16, vocab=config.vocab_size))
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    common = params, cache, state, i32((rows,)), i32((rows, pages)), i32((rows,))
    flags = jax.ShapeDtypeStruct((rows,), bool)
    programs = {
        "decode": (functools.partial(engine.decode, config=config, steps=16, speculation=0), *common, i32(())),
        "speculate": (functools.partial(engine.decode, config=config, steps=4, speculation=4), *common, i32(())),
        "mixed": (functools.partial(engine.mixed, config=config, tokens=512), *common, i32((rows + 1,)), flags, i32((2, rows))),
    }
    for name, (function, *arguments) in programs.items():
        memory = aot.compile_for(target, function, *arguments, donate_argnums=(1, 2)).memory_analysis()
        donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache, state)))
        yield name, {"donated": donated, "alias": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes}


def shorten(header, layers: int) -> None:
    """Takes away the layers from `layers` on."""
    header.metadata[f"{header.metadata['general.architecture']}.block_count"] = layers
    for name in list(header.tensors):
        if name.startswith("blk.") and int(name.split(".")[1]) >= layers:
            del header.tensors[name]


def launches(text: str) -> list[int]:
    """Kernels launched by one pass of each loop body of an optimized GPU program that is run once a layer or period,
    inner loops counted once: the loops that the entry computation runs."""
    bodies = _computations(text)

    def count(name: str) -> int:
        total = 0
        for line in bodies.get(name, ()):
            operation = re.match(r"(?:ROOT )?%?[\w.\-]+ = .*? ([\w\-]+)\(", line)
            if operation is None or operation[1] in _FREE:
                continue
            if operation[1] in _CONTROL:
                total += sum(count(inner) for inner in re.findall(r"(?:body|condition|to_apply)=%?([\w.\-]+)", line))
            else:
                total += 1
        return total

    entry = next(name for name in bodies if name.startswith("ENTRY "))
    loops = [re.search(r" while\(.*body=%?([\w.\-]+)", line) for line in bodies[entry]]
    counts = collections.Counter(count(loop[1]) for loop in loops if loop)
    return sorted(counts.elements())


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2] if head[1] is None else f"ENTRY {head[2]}"
            found[name] = []
        elif name and line.startswith("  "):
            found[name].append(line.strip())
    return found


if __name__ == "__main__":
    main(sys.argv[1])
