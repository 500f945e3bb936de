"""Builds the C++ kernels against the jaxlib that is running, once, and registers them with XLA.

The library is kept in the user's cache under a name with two digests. The first is of its sources, the tables that Python
writes for them, the headers it was built against, the compiler and the instruction set, so another jaxlib, compiler or CPU gets
its own library and an old one is never loaded by mistake; the second is of its content, so a damaged one is built again and
never loaded (`pallas_kernels.cache`). Only code for this CPU is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from pathlib import Path

import jax
import jaxlib

from pallas_kernels import cache
from pallas_kernels.native import tables

SOURCES = Path(__file__).parent / "src"
Progress = Callable[[int, int | None, str], None]
_LOG = logging.getLogger(__name__)
TARGETS = ("ferrum_matmuls", "ferrum_swiglu", "ferrum_experts", "ferrum_layers", "ferrum_delta_net")
_SECONDS = 300  # time limit of a compiler
_LOCK = threading.Lock()
_PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)
_INSTEAD = "; XLA's own code serves instead, more slowly"

# Instruction sets of a processor, the best first: the sources of each (the slowest to compile first), and the features that the
# operating system must list. The portable one is for any processor.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c", "bmi2"}
_SETS = {
    "x86-64": {
        "amx": (("avx512_vnni", "avx512_dots", "amx"), _AVX512 | {"amx_tile", "amx_int8"}),
        "avx512_vnni": (("avx512_vnni", "avx512_dots"), _AVX512),
        "avx2": (("avx2",), {"avx2", "fma", "f16c", "bmi2"}),
    },
    "arm64": {
        "neon_i8mm": (("neon_dotprod", "neon_i8mm"), {"asimddp", "i8mm"}),
        "neon_dotprod": (("neon_dotprod",), {"asimddp"}),
    },
}
_ALL = (*(name for sets in _SETS.values() for name in sets), "portable")
_PROCESSORS = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
# What a unit is compiled with, in words of GCC and of any clang, Apple's included; the x86-64 ones say it in the source.
_FLAGS = {"neon_dotprod": ["-march=armv8.2-a+dotprod"], "neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
_COMMON = ("ffi", "layers", "kernels", "delta_net")


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, built if necessary and registered with XLA; or, in words, why they are not available."""
    with _LOCK:
        compiler = _compiler()
        if compiler is None:
            return "there is no C++ compiler (c++, g++, clang++ or $CXX)" + _INSTEAD
        try:
            path = _built(compiler)
            try:
                return _registered(path)
            except (OSError, AttributeError):  # for example built for another C++ runtime library, in a shared home
                path.unlink(missing_ok=True)
                return _registered(_built(compiler))
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed: {_complaint(error.stderr or '') or error}{_INSTEAD}"
        except (OSError, AttributeError, subprocess.TimeoutExpired, jax.errors.JaxRuntimeError) as error:
            return f"{_reason(error)}{_INSTEAD}"


def _complaint(text: str) -> str:
    """The line of a compiler's output that says what is wrong: the first with "error" in it, otherwise the last."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[-1])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{type(error).__name__}: {error}"


def prepare(progress: Progress | None = None) -> None:
    """Builds the kernels if necessary. progress: called with (parts done, all parts, what is being done)."""
    token = _PROGRESS.set(progress)
    try:
        library()
    finally:
        _PROGRESS.reset(token)


def refusal() -> str | None:
    """Why the kernels are not available, or None."""
    found = library()
    return found if isinstance(found, str) else None


def isa() -> str:
    """The instruction set that the kernels use on this machine, "" if they are not available."""
    found = library()
    return "" if isinstance(found, str) else found.ferrum_native_isa().decode()


@functools.cache  # a name cannot be registered twice in a process
def _registered(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.ferrum_native_isa.restype = ctypes.c_char_p
    handlers = {name: jax.ffi.pycapsule(getattr(found, name)) for name in TARGETS}
    if not found.ferrum_native_isa():
        raise OSError("this CPU lacks instructions that the operating system lists for it")
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return found


def _compiler() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def instruction_sets(processor: str, cpuinfo: str | None) -> tuple[str, ...]:
    """Those to build for a processor, named as by platform.machine(), and Linux's text about it.

    It is the best one that the text lists; without a text (macOS) all of them, of which the library takes the best when it is
    loaded.
    """
    sets = _SETS.get(_PROCESSORS.get(processor.lower(), ""), {})
    lists = [line.partition(":")[2] for line in (cpuinfo or "").splitlines() if line.lower().startswith(("flags", "features"))]
    if not lists:
        return (*sets, "portable")
    features = set(lists[0].split())
    return (next((name for name, (_, needed) in sets.items() if needed <= features), "portable"),)


def _cpuinfo() -> str | None:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return None


def units_of(sets: Sequence[str]) -> list[str]:
    """The sources of instruction sets, without their suffix."""
    known = {name: units for of in _SETS.values() for name, (units, _) in of.items()}
    return list(dict.fromkeys(unit for name in sets for unit in known.get(name, (name,))))


def flags_of(unit: str) -> list[str]:
    """The flags of a compiler that a source needs for its instructions."""
    return _FLAGS.get(unit, [])


def _built(compiler: str) -> Path:
    """The path of the library. OSError or CalledProcessError if it cannot be built."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
    sets = instruction_sets(platform.machine(), _cpuinfo())
    digest = hashlib.blake2b(f"{jaxlib.__version__} {version} {platform.machine()} {sets}".encode(), digest_size=12)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(tables.header().encode())
    folder, name = cache.cache_root() / "native", f"kernels-{digest.hexdigest()}"
    cache.make_private(folder)
    for path in sorted(folder.glob(f"{name}.*.so")):
        if path.name == _named(name, path):
            return path
        path.unlink()
    with cache.workspace(folder) as work:
        fresh = _compiled(compiler, sets, work)
        path = folder / _named(name, fresh)
        cache.put(fresh, path)
    return path


def _named(name: str, path: Path) -> str:
    with path.open("rb") as file:
        return f"{name}.{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.so"


def _compiled(compiler: str, sets: tuple[str, ...], work: Path) -> Path:
    units = units_of(sets)
    without = [f"-DFERRUM_WITHOUT_{name.upper()}" for name in _ALL if name not in units]
    flags = ["-O3", "-std=c++17", "-fPIC", f"-I{work}", f"-I{jax.ffi.include_dir()}", *without]
    (work / "tables.h").write_text(tables.header())
    units[2:2] = _COMMON
    report, text = _PROGRESS.get(), "building the C++ kernels for this CPU, which is done once"
    if report:
        report(0, None, text)
    else:
        _LOG.warning("%s and takes some seconds", text)

    def run(*arguments: str) -> None:
        subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)

    def compile(unit: str) -> None:
        run(*flags, *flags_of(unit), "-c", str(SOURCES / f"{unit}.cc"), "-o", str(work / f"{unit}.o"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, future in enumerate(as_completed([pool.submit(compile, unit) for unit in units])):
            future.result()
            if report:
                report(done + 1, len(units), text)
    run("-shared", *(str(work / f"{unit}.o") for unit in units), "-o", str(work / "kernels.so"))
    return work / "kernels.so"
