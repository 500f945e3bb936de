"""Builds the C++ kernels against the jaxlib that is running, once, and registers them with XLA.

The library is kept in the user's cache under a name that is a digest of its sources, the headers it was built against, the
compiler and the machine, so another jaxlib or compiler gets one of its own and an old one is never loaded by mistake.
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
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib

SOURCES = Path(__file__).parent / "src"
_LOG = logging.getLogger(__name__)
TARGETS = ("ferrum_matmuls", "ferrum_swiglu", "ferrum_experts", "ferrum_layers")
_SECONDS = 300  # a compiler may take


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, built where they are not yet and registered with XLA; or, in words, why they cannot be had."""
    compiler = _compiler()
    if compiler is None:
        return "there is no C++ compiler (c++, g++, clang++ or $CXX)"
    try:
        return _registered(_built(compiler))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error}"
    except (OSError, AttributeError, subprocess.TimeoutExpired, jax.errors.JaxRuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def refusal() -> str | None:
    """Why the kernels cannot be had, None where they can."""
    found = library()
    return found if isinstance(found, str) else None


def isa() -> str:
    """The instruction set that the kernels take on this machine, "" where they cannot be had."""
    found = library()
    return "" if isinstance(found, str) else found.ferrum_native_isa().decode()


@functools.cache  # a name cannot be registered twice in a process
def _registered(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.ferrum_native_isa.restype = ctypes.c_char_p
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, name)), platform="cpu")
    return found


def _compiler() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def _built(compiler: str) -> Path:
    """The path of the library. OSError and CalledProcessError where it cannot be made."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
    digest = hashlib.blake2b(f"{jaxlib.__version__} {version} {platform.machine()}".encode(), digest_size=12)
    sources = sorted(SOURCES.iterdir())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "ferrum_jax" / "native" / f"kernels-{digest.hexdigest()}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _LOG.warning("building the C++ kernels for this CPU, which is done once and takes up to half a minute")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / "kernels.so"
        flags = ["-O3", "-std=c++17", "-fPIC", f"-I{jax.ffi.include_dir()}"]
        units = {str(source): f"{folder}/{source.stem}.o" for source in sources if source.suffix == ".cc"}

        def run(*arguments: str) -> None:
            subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda unit: run(*flags, "-c", *unit), ((unit, "-o", made) for unit, made in units.items())):
                pass
        run("-shared", *units.values(), "-o", str(fresh))
        fresh.replace(path)  # in one step, so that nobody loads half of it
    return path
