"""What ran on the device, from a profile that jax writes: kernels, how often, and for how long.

The profiler's own file is read with jax alone. Lines named "Stream ..." of a GPU's plane hold what the device did in order;
other lines are made from these. While a profile is taken XLA launches kernels one by one instead of as CUDA graphs, so kernel
times are true and the gaps between them are not: idle time is the time of an unprofiled step minus that of its kernels.
"""

from __future__ import annotations

import glob
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One kind of device work: its name without the trailing number, how often it ran, and its seconds in total."""

    name: str
    count: int
    seconds: float


def record(work: Callable[[], Any]) -> list[Kernel]:
    """The kernels of one call of `work`, most expensive first; none without a GPU.

    Without one no profile is taken: with compilers for absent devices loaded, jax's profiler can crash the process on a CPU.
    """
    if jax.default_backend() == "gpu":
        return profile(work)
    jax.block_until_ready(work())
    return []


def profile(work: Callable[[], Any]) -> list[Kernel]:
    """The kernels on the GPUs during one call of `work`, from a profile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(work())
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        return kernels(jax.profiler.ProfileData.from_file(path).planes)


def kernels(planes: Iterable[Any]) -> list[Kernel]:
    """Sums of the events on the streams of the GPUs."""
    counts: Counter[str] = Counter()
    nanoseconds: Counter[str] = Counter()
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = plain(event.name)
                counts[name] += 1
                nanoseconds[name] += event.duration_ns
    return [Kernel(name, counts[name], time / 1e9) for name, time in nanoseconds.most_common()]


def plain(name: str) -> str:
    """A kernel's name without the numbers that XLA appends: "loop_add_fusion_12" is "loop_add_fusion"."""
    return name.rstrip("0123456789_.") or name


def summary(found: list[Kernel], steps: int, step_s: float, top: int = 10) -> dict[str, Any]:
    """Launches, kernel time and idle time of a step, and the kernels that take most of it. step_s: measured without a
    profile."""
    if not found:
        return {}
    copies = [kernel for kernel in found if kernel.name.lower().startswith(("memcpy", "memset"))]
    busy = sum(kernel.seconds for kernel in found) / steps
    return {
        "launches": round(sum(kernel.count for kernel in found) / steps, 1),
        "copies": round(sum(kernel.count for kernel in copies) / steps, 1),
        "kernel_ms": round(1e3 * busy, 4),
        "idle_ms": round(1e3 * (step_s - busy), 4),
        "top": [
            {"kernel": kernel.name, "launches": round(kernel.count / steps, 1), "ms": round(1e3 * kernel.seconds / steps, 4)}
            for kernel in found[:top]
        ],
    }
