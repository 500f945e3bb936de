"""What compilation costs: every program that serving needs, in a process that starts from nothing.

The section runs twice, in two processes that share a cache of compiled programs: the first finds it empty and fills it for the
second. Nothing is loaded; programs compile from shapes. Time is counted from the start of the process.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tensors
from benchmarks.gpu import whole
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sizes import goal
from ferrum_jax import functional
from pallas_kernels import dispatch

BUCKETS = (1, 8, 32)  # rows of decode programs


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    name = "warm start" if os.environ.get("BENCHMARK_WARM") else "cold compile"
    yield name, lambda: compile_all(lab, name)


def compile_all(lab: Lab, name: str) -> Iterator[dict]:
    begin = float(os.environ.get("BENCHMARK_BEGIN", time.time()))
    ready = time.time() - begin
    took = {}
    absent = lab.rehearsal and lab.collecting
    for label, function, args, static in programs(lab):
        if absent and label not in ("decode 8", "prefill 64"):
            continue  # programs of the section "model"
        before = time.time()
        if lab.collecting:
            lab.run(function, *args, donate=(1,), **static)
        else:
            lab.program(function, *args, donate=(1,), **static)
        took[label] = round(time.time() - before, 2)
        if not lab.collecting:
            yield {"name": f"{name}: {label}", "value": took[label], "unit": "s"}
    if not lab.collecting:
        compiled = sum(took.values())
        whole_s = compiled if name == "cold compile" else time.time() - begin
        row = {"name": name} | goal(name, round(whole_s, 2), lab.sizes)
        yield row | {"compile_s": round(compiled, 2), "import_and_device_s": round(ready, 2)}


def programs(lab: Lab) -> Iterator[tuple[str, Callable, tuple, dict[str, Any]]]:
    """(label, function, arguments with shapes in place of large arrays, static arguments) of each program."""
    sizes, config = lab.sizes, lab.sizes.config
    if lab.rehearsal and lab.collecting:  # one kind of layer instead of five: other sections compile all of them
        config = dataclasses.replace(config, num_layers=1)
    params = tensors.shapes(config, lab.target)

    def cache(rows: int):
        with dispatch.on(lab.target):
            return jax.eval_shape(functools.partial(whole.empty_cache, config=config, tokens=rows * sizes.capacity))

    def shapes(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)

    for rows in sorted({min(rows, sizes.batch) for rows in BUCKETS}):
        arguments = (shapes(whole.state(lab, rows, sizes.context)), shapes(whole.sampling(lab, rows)), whole.KEY)
        static: dict[str, Any] = {"config": config, "steps": sizes.steps}
        yield f"decode {rows}", functional.advance, (params, cache(rows), *arguments, np.int32(sizes.steps)), static
    for chunk in sizes.chunks:
        arguments = (*whole.prompt(lab), shapes(whole.sampling(lab, 1)), whole.KEY)
        yield f"prefill {chunk}", functional.start, (params, cache(1), *arguments), {"config": config, "chunk": chunk}
