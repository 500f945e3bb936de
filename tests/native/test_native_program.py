"""The C++ kernels under sanitizers: builds this folder's program with them, without XLA, and runs it."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pallas_kernels.native import build, tables
from support.compiler import needs_compiler

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@needs_compiler
def test_kernels_agree_with_double_precision_and_bit_for_bit_under_sanitizers(tmp_path: Path) -> None:
    compiler = build._compiler()
    assert compiler is not None
    units = [unit for unit in sorted(build.SOURCES.glob("*.cc")) if unit.name != "ffi.cc"]
    units += sorted(Path(__file__).parent.glob("*.cc"))

    (tmp_path / "tables.h").write_text(tables.header())
    includes = [f"-I{folder}" for folder in (build.SOURCES, tmp_path)]

    def compiled(unit: Path) -> str:
        made = str(tmp_path / f"{unit.stem}.o")
        run([compiler, "-O1", "-std=c++17", "-Wall", "-Wextra", *SANITIZERS, *includes, "-c", str(unit), "-o", made])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    program = tmp_path / "program"
    run([compiler, *SANITIZERS, *objects, "-o", str(program), "-pthread"])
    report = run([str(program)])
    assert "0 failures" in report and "portable" in report


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
