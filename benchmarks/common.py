"""What the benchmarks share: a description of the machine, samples taken while it is quiet, and result files.

Benchmarks run on shared machines, and other work on the same cores changes ratios, not only times. So every sample is preceded
by a wait for quiet, records how many cores other processes used meanwhile, and is repeated if that was too many; the largest
number that remained is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = ROOT / "tests" / "goldens" / "real" / "text.txt"  # about 1,500 words of plain English

QUIET = 0.15  # cores that other processes may use during a sample
_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """The CPU, its cores and instruction sets, and the memory in GiB; nothing that identifies the host."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.machine()).strip(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in _SHOWN_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide what is computed, and of `others`."""
    names = ("jax", "jaxlib", "flax", "ferrum-jax", *others)
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """{"median", "min", "max", "samples"}."""
    parts = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in parts.items()} | {"samples": len(values)}


class Load:
    """Cores that processes other than this one and `pids` have used since it was made."""

    def __init__(self, pids: Sequence[int] = ()):
        self.pids = pids
        self.begin = self._now()

    def cores(self) -> float:
        passed, busy, ours = (now - then for now, then in zip(self._now(), self.begin, strict=True))
        return max(0.0, (busy - ours) / passed)

    def _now(self) -> tuple[float, float, float]:
        """Seconds: wall clock, all processors busy (stolen time included), this process and `pids`."""
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ours = sum(os.times()[:2])
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ours += (int(fields[11]) + int(fields[12])) / tick
        return time.perf_counter(), (user + nice + system + irq + softirq + steal) / tick, ours


class Patience:
    """Seconds that a benchmark may still spend on waiting and on repeated samples; after that it accepts what it gets."""

    left = 60.0


def wait_for_quiet() -> None:
    """Returns once other processes have left the cores idle for half a second, or when patience is spent."""
    while Patience.left > 0:
        load = Load()
        time.sleep(0.5)
        if load.cores() <= QUIET:
            return
        Patience.left -= 0.5


def sample(work: Callable[[], Any], pids: Sequence[int] = ()) -> tuple[float, float, Any]:
    """(seconds, cores that others used meanwhile, result) of `work`: the first quiet try, or the quieter of two.

    `pids`: processes whose load counts as the work's own."""
    tries: list[tuple[float, float, Any]] = []
    while len(tries) < 2:
        wait_for_quiet()
        load, begin = Load(pids), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
        tries.append((seconds, round(load.cores(), 2), result))
        if tries[-1][1] <= QUIET or Patience.left < seconds:
            break
        Patience.left -= seconds
    return min(tries, key=lambda one: one[1])


def write(name: str, result: dict[str, Any], *packages: str, keep: bool = False) -> None:
    """Writes a result, with machine and versions, to benchmarks/results/NAME.json. keep: parts of the existing file that this
    result lacks are kept; ValueError if they come from another machine, other versions or another model."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"benchmark": name, "machine": machine(), "versions": versions(*packages)} | result
    if keep:
        known = json.loads(path.read_text())
        if other := [key for key in ("machine", "versions", "model", "threads") if known[key] != whole[key]]:
            raise ValueError(f"{path.name}: its {' and '.join(other)} are not of this run; measure all parts")
        whole = known | whole
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"wrote {name}.json", flush=True)
