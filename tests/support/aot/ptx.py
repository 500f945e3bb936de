"""What a GPU kernel compiled to, measured without a GPU: no spills, and the length of its loop.

XLA refuses to compile a kernel that keeps registers in memory. It writes the PTX of a deviceless compilation to a folder;
the ptxas of the nvidia-cuda-nvcc wheel assembles it again, verbosely; the machine code is read from the ELF file:
instructions of 16 bytes, the longest jump backwards is the loop. From jax 0.12 on XLA does not write the PTX of Triton
kernels: `measure` then returns none, and a test that has looked at the rest says so with `need_kernels`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable

import jax
import pytest

from pallas_kernels import aot

_BRANCH = 0x947
_SEEN = tuple(int(n) for n in jax.__version__.split(".")[:2]) < (0, 12)
_OPTIONS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """registers: per thread; loop: instructions of the longest loop, 0 if there is none."""

    name: str
    registers: int
    instructions: int
    loop: int


def need_kernels() -> None:
    """Skips the rest of a test if kernels cannot be read."""
    if not _SEEN:
        pytest.skip(f"jax {jax.__version__} does not write the PTX of kernels; all but their instructions is checked")


def measure(target: str, function: Callable, *args, **jit_options) -> tuple[dict[str, Kernel], int]:
    """The kernels of `function` compiled for a GPU of `aot.GPUS`, by name, and the bytes of its temporaries. JaxRuntimeError if
    a kernel spills."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, **_OPTIONS}
        compiled = aot.compile_for(target, function, *args, compiler_options=options, **jit_options)
        kernels = [kernel for file in pathlib.Path(folder).glob("*.ptx") for kernel in _assemble(file, target)]
    return {kernel.name: kernel for kernel in kernels}, compiled.memory_analysis().temp_size_in_bytes


def _assemble(ptx: pathlib.Path, target: str) -> list[Kernel]:
    if ".entry" not in ptx.read_text():
        return []
    major, minor = aot.GPUS[target].compute_capability
    architecture, binary = f"sm_{major}{minor}{'a' * (major == 9)}", ptx.with_suffix(".cubin")
    command = [_ptxas(), "-v", f"-arch={architecture}", str(ptx), "-o", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = []
    for name, code in _sections(binary.read_bytes()).items():
        if name.startswith(".text."):
            entry = name.removeprefix(".text.")
            properties = report.split(f"Function properties for {entry}\n", 1)[1]
            registers = int(re.search(r"Used (\d+) registers", properties).group(1))
            kernels.append(Kernel(entry, registers, len(code) // 16, _longest_loop(code, hopper=major >= 9)))
    return kernels


def _ptxas() -> str:
    (package,) = importlib.util.find_spec("nvidia").submodule_search_locations
    return str(next(pathlib.Path(package).glob("cu*/bin/ptxas")))


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit little-endian ELF file by name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]  # name, .., .., .., offset, length
    names = elf[headers[names_at][4] :]
    return {names[h[0] : names.index(b"\0", h[0])].decode(): elf[h[4] : h[4] + h[5]] for h in headers}


def _longest_loop(code: bytes, hopper: bool) -> int:
    """The largest number of instructions between a branch and the place it jumps back to."""
    longest = 0
    for low, high in struct.iter_unpack("<QQ", code):
        if low & 0xFFF == _BRANCH:
            words = ((low >> 34) | (high << 30)) & ((1 << 48) - 1)  # of four bytes, from the next instruction on
            words -= (words >> 47) << 48
            if hopper:
                words = (words << 8) | ((low >> 16) & 0xFF)
            longest = max(longest, -words // 4)
    return longest if longest > 1 else 0  # the end of a kernel jumps to itself
