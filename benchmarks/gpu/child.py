"""Runs one section in a separate process and reports events to the parent, one per line: "@" and JSON.

{"hello": {...}}   the device and the versions that measure
{"alive": null}    after each of many programs that are compiled at once
{"begin": step}    so that the parent knows which step a process died in
{"row": {...}}     a result
{"failed": {"step", "error"}}
{"compiled": {"name", "seconds", "temp_gib", "arguments_gib"}}   in a process that only compiles
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sizes import REAL, SMALL, TARGET
from ferrum_jax.programs import enable_compilation_cache

DEAD = 3  # exit code when the device no longer answers
GIB = 2**30


def emit(kind: str, value: Any) -> None:
    sys.stdout.write(f"@{json.dumps({kind: value})}\n")  # in one piece, as compiling threads report "alive" at the same time
    sys.stdout.flush()


def main(section: str, mode: str, skip: frozenset[str]) -> int:
    """mode: "measure" on the default device, "rehearse" at small shapes there, "compile" for a device that is absent."""
    module = importlib.import_module(f"benchmarks.gpu.{section}")
    if mode == "compile":
        from pallas_kernels import aot

        lab = Lab(REAL, None, aot.TARGETS[TARGET].target, rehearsal=True)
    else:
        enable_compilation_cache()
        lab = Lab(REAL if mode == "measure" else SMALL, jax.devices()[0], rehearsal=mode == "rehearse")
        lab.compiled = lambda: emit("alive", None)
        emit("hello", about(lab))
        if getattr(module, "AHEAD", False) and mode == "measure":
            lab.ahead(lambda scout: run_all(module.steps(scout), skip))
    done: set[Any] = set(getattr(module, "COMPILED_ELSEWHERE", ()))
    once = getattr(module, "COMPILED_ONCE", ())
    for name, step in module.steps(lab):
        if name in skip:
            continue
        emit("begin", name)
        try:
            for row in step():
                emit("row", row)
        except Exception as error:
            failed(name, error)
            if not lab.collecting and not alive():
                return DEAD
        if lab.collecting:
            compile_new(lab, done, once)
    return 0


def run_all(steps: Any, skip: frozenset[str]) -> None:
    for name, step in steps:
        if name not in skip:
            with contextlib.suppress(Exception):  # it will fail again, and be reported, when its turn comes
                list(step())


def failed(name: str, error: Exception) -> None:
    lines = str(error).splitlines() or [""]
    emit("failed", {"step": name, "error": f"{type(error).__name__}: {lines[0]}"[:2000]})
    traceback.print_exc(file=sys.stderr)


def alive() -> bool:
    """Whether the device still computes: after a wrong address it never will again in this process."""
    try:
        return float(jnp.arange(8.0).sum()) == 28.0
    except Exception:
        return False


def compile_new(lab: Lab, done: set[Any], once: Collection[Callable]) -> None:
    """Compiles collected programs that are not in `done`, which holds programs and whole functions. One program of each
    function in `once` is enough."""
    for key, (program, _) in lab.collected.items():
        if key in done or program.function in done:
            continue
        done.add(program.function if program.function in once else key)
        begin = time.perf_counter()
        try:
            memory = program.compile_for(TARGET).memory_analysis()
        except Exception as error:
            failed(f"compiling {program.name}", error)
            continue
        found = {"name": program.name, "seconds": round(time.perf_counter() - begin, 2)}
        sizes = {"temp_gib": memory.temp_size_in_bytes, "arguments_gib": memory.argument_size_in_bytes}
        emit("compiled", found | {name: round(size / GIB, 3) for name, size in sizes.items()})


def about(lab: Lab) -> dict[str, Any]:
    """The device and the versions of what computes."""
    import flax
    import jaxlib

    import ferrum_jax

    device = lab.device
    stats = device.memory_stats() if device.platform != "cpu" else None
    facts = {
        "name": device.device_kind,
        "kind": str(lab.target),
        "memory_gib": round(stats["bytes_limit"] / GIB, 1) if stats else None,
    }
    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "ferrum-jax": ferrum_jax.__version__,
    }
    return {"device": facts, "versions": versions, "backend": get_backend().platform_version}
