"""The parent of the sections: allots time, survives the crash of a section's process, and keeps the results."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu.sizes import REAL, TARGET

Event = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Section:
    """`module` of this package; it may take `seconds`, and is started only if at least half of them are left."""

    name: str
    module: str
    seconds: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


SECTIONS = (
    Section("kernels are right", "check_kernels", 110),
    Section("attention is right", "check_attention", 50),
    Section("gated delta nets are right", "check_recurrence", 30),
    Section("two layers are right", "check_logits", 60),
    Section("compilation", "starts", 130),
    Section("whole model", "model", 120),
    Section("warm start", "starts", 40, {"BENCHMARK_WARM": "1"}),
    Section("kernels alone", "kernels", 120),
    Section("variants", "variants", 120),
    Section("tiles", "tiles", 120),
)
LIMIT = 465.0  # seconds for all sections
RESTARTS = 8  # of one section, each without the steps that were started before
SILENCE = 90.0  # seconds without an event after which a step counts as hanging


@dataclasses.dataclass
class Outcome:
    """What came of a section. `failures`: steps that raised, crashed or hung, with the error; `skipped`: why it did not run."""

    seconds: float = 0.0
    rows: list[dict] = dataclasses.field(default_factory=list)
    failures: list[dict] = dataclasses.field(default_factory=list)
    skipped: str | None = None
    hello: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def wrong(self) -> list[str]:
        """Checks that did not hold, by name."""
        return [row["name"] for row in self.rows if not row.get("check", row).get("ok", True)]

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "hello"}


def run_section(
    section: Section, mode: str, limit: float, say: Callable[[str], None], environment: Mapping[str, str] = {}
) -> Outcome:
    """Runs the section's steps, in as many processes as it takes, for `limit` seconds at most."""
    outcome, begun = Outcome(), []
    start = time.monotonic()

    def event(kind: str, value: Any) -> None:
        if kind == "alive":
            return
        if kind == "hello":
            outcome.hello = value
        elif kind == "begin":
            begun.append(value)
        elif kind == "failed":
            outcome.failures.append(value)
            say(f"  FAILED {value['step']}: {value['error']}")
        else:
            outcome.rows.append(value)
            say("  " + line(value))

    environment = {**environment, **section.environment}
    for _ in range(RESTARTS):
        command = ["benchmarks.gpu", "--section", section.module, "--mode", mode, "--skip", json.dumps(begun)]
        silence = SILENCE if mode == "measure" else float("inf")
        ended = run_child(command, environment, start + limit - time.monotonic(), silence, event)
        if ended is None:
            break
        step = begun[-1] if begun else "start"
        if not outcome.failures or outcome.failures[-1]["step"] != step:
            event("failed", {"step": step, "error": ended})
        if ended == "out of time" or (not begun and "BENCHMARK_ONE_BY_ONE" in environment):
            break
        if not begun:
            environment["BENCHMARK_ONE_BY_ONE"] = "1"
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def run_child(module: list[str], environment: dict[str, str], limit: float, silence: float, event: Event) -> str | None:
    """Runs `python -m` with these arguments and passes on its events. Returns None if it finished, else how it ended.

    silence: seconds without an event after which it counts as hanging."""
    environment = os.environ | {"BENCHMARK_BEGIN": str(time.time())} | environment
    deadline = time.monotonic() + limit
    command = [sys.executable, "-m", *module]
    lines: queue.Queue[str | None] = queue.Queue()

    def read(output: Iterable[str]) -> None:
        for text in output:
            lines.put(text)
        lines.put(None)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=common.ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    text = lines.get(timeout=max(0.0, min(left, silence, 1e6)))
                except queue.Empty:
                    return "out of time" if time.monotonic() >= deadline else f"no sign of life for {silence:.0f} s"
                if text is None:
                    break
                if text.startswith("@"):
                    [(kind, value)] = json.loads(text[1:]).items()
                    event(kind, value)
            code = process.wait()
            if code == 0:
                return None
            errors.seek(0)
            last = [text.strip() for text in errors.read().splitlines() if text.strip()][-3:]
            return f"exit code {code}: {' | '.join(last)}"[:2000]
        finally:
            process.kill()
            process.wait()


def line(row: dict) -> str:
    """A row for the screen."""
    check = row.get("check", row)
    parts = [row["name"]]
    if "value" in row:
        parts.append(f"{row['value']:,.4g} {row['unit']}")
    if "must" in row:
        parts.append(f"(must {row['must']:g}, aim {row['aim']:g}, floor {row['floor']})")
    if "seconds" in row:
        parts.append(f"{row['seconds']} s, temporaries {row['temp_gib']} GiB")
    if "launches" in row:
        parts.append(f"{row['launches']} launches, {row['kernel_ms']} ms in kernels, {row['idle_ms']} ms idle a {row['of']}")
    if "error" in check:
        parts.append(f"error {check['error']:.3g}, bound {check['bound']:.3g}")
    if "ok" in check:
        parts.append("ok" if check["ok"] else "WRONG")
    return ", ".join(parts)


def slug(device: str) -> str:
    """A device's name as part of a file's: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")


def write(out: Path, outcomes: dict[str, Outcome]) -> Path | None:
    """Writes everything so far to gpu-DEVICE.json in one step; returns None before a device has reported."""
    hello = next((outcome.hello for outcome in outcomes.values() if outcome.hello), None)
    if hello is None:
        return None
    result = {"benchmark": "gpu", "machine": common.machine(), "device": hello["device"], "backend": hello["backend"]}
    result["versions"] = {"python": platform.python_version()} | hello["versions"]
    result["steps"] = REAL.steps
    result["sections"] = {name: outcome.as_json() for name, outcome in outcomes.items()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{slug(hello['device']['name'])}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    return partial.replace(path)


def measure(out: Path, only: list[str], limit: float = LIMIT) -> int:
    """Runs all sections; returns the number of checks that did not hold and steps that failed."""
    begin = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as cache:
        memory = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")
        environment = {"XDG_CACHE_HOME": cache, "XLA_PYTHON_CLIENT_MEM_FRACTION": memory}
        say = functools.partial(print, flush=True)
        for section in SECTIONS:
            left = limit - (time.monotonic() - begin)
            if only and section.module not in only:
                continue
            print(f"{section.name}: {time.monotonic() - begin:.0f} s gone", flush=True)
            if left < section.seconds / 2:
                outcomes[section.name] = Outcome(skipped=f"{left:.0f} s were left of {limit:.0f}")
                print(f"  skipped: {outcomes[section.name].skipped}", flush=True)
            else:
                seconds = min(left, section.seconds)
                outcomes[section.name] = run_section(section, "measure", seconds, say, environment)
            path = write(out, outcomes)
    bad = 0
    for name, outcome in outcomes.items():
        failures = [failure["step"] for failure in outcome.failures]
        bad += len(outcome.wrong()) + len(failures)
        print(f"{name}: {len(outcome.rows)} rows in {outcome.seconds} s; wrong {outcome.wrong()}; failed {failures}")
    print(f"{path}: {time.monotonic() - begin:.0f} s in all", flush=True)
    return bad


def rehearse(only: list[str]) -> int:
    """Runs every section at small shapes on the CPU, and compiles every program of a real run for the device, one process per
    core."""
    chosen = [section for section in SECTIONS if not only or section.module in only]
    compiled = [(section, "compile") for section in chosen if not section.environment]
    # Long ones first; "starts" last, so that it finds what "model" has compiled.
    jobs = sorted(compiled, key=lambda job: -job[0].seconds)
    jobs += sorted([(section, "rehearse") for section in chosen], key=lambda job: job[0].module == "starts")

    def work(job: tuple[Section, str]) -> int:
        section, mode = job
        said: list[str] = []
        outcome = run_section(section, mode, float("inf"), said.append, environment)
        what = f"programs compiled for {TARGET}" if mode == "compile" else "rows at small shapes"
        bad = len(outcome.failures) + len(outcome.wrong())
        print("\n".join([*said, f"{section.name}: {len(outcome.rows)} {what} in {outcome.seconds} s, {bad} bad"]), flush=True)
        return bad

    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": cache}
        return sum(pool.map(work, jobs))
