"""The C++ kernels without XLA: builds this folder's program, with sanitizers for this machine and for arm64, and runs it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pallas_kernels.native import build, tables
from support.compiler import needs_compiler

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ARM64, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@needs_compiler
def test_kernels_agree_with_double_precision_and_bit_for_bit_under_sanitizers(tmp_path: Path) -> None:
    compiler = build._compiler()
    assert compiler is not None
    report = run([str(built(compiler, tmp_path, "-O1", *SANITIZERS))])
    assert "0 failures" in report and "portable" in report


@pytest.mark.skipif(not (ARM64 and EMULATOR), reason="needs Debian's g++-aarch64-linux-gnu and qemu-user")
def test_kernels_for_arm64_agree_bit_for_bit_in_an_emulator(tmp_path: Path) -> None:
    assert ARM64 and EMULATOR
    program = built(ARM64, tmp_path, "-O2", "-static")
    assert "portable neon_dotprod neon_i8mm tested: 0 failures" in run([EMULATOR, "-cpu", "max", str(program), "brief"])


def built(compiler: str, folder: Path, *flags: str) -> Path:
    units = [unit for unit in sorted(build.SOURCES.glob("*.cc")) if unit.name != "ffi.cc"]
    units += sorted(Path(__file__).parent.glob("*.cc"))
    (folder / "tables.h").write_text(tables.header())
    options = [*flags, "-std=c++17", "-Wall", "-Wextra", *(f"-I{include}" for include in (build.SOURCES, folder))]

    def compiled(unit: Path) -> str:
        made = str(folder / f"{unit.stem}.o")
        own = build.flags_of(unit.stem) if compiler == ARM64 or platform.machine() in ("aarch64", "arm64") else []
        run([compiler, *options, *own, "-c", str(unit), "-o", made])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    program = folder / "program"
    run([compiler, *flags, *objects, "-o", str(program), "-pthread"])
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
