"""Keeps compiled programs on disk, so that the next process does not trace, lower or compile them.

XLA's persistent cache saves only the compilation: a program must be traced and lowered before it can be looked up, which takes
longer than loading it. Here, the key of a program is everything that tracing depends on (`key`): the code of these packages,
the versions and settings of JAX, the placement, and the function with its static arguments and shapes. In doubt, the key
differs, so a key never leads to a wrong program.

The files are in a folder next to XLA's. They are executed, so a damaged one is deleted without loading it, and none is loaded
from a folder that other users can write to (`pallas_kernels.cache`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

import pallas_kernels
from ferrum_jax.distributed import Placement
from pallas_kernels import cache, dispatch, native

_LOG = logging.getLogger(__name__)
_LIMIT = 1 << 30  # bytes of all programs; beyond it, the least recently used are deleted
_READ_BY_XLA = ("XLA_", "LIBTPU_", "TF_", "NPROC")  # prefixes of environment variables
_PACKAGES = (Path(__file__).parent, Path(pallas_kernels.__file__).parent)


def directory() -> Path | None:
    """The folder of the programs, inside that of XLA's persistent cache, or None if that cache is off."""
    config: Any = jax.config
    chosen = config.jax_compilation_cache_dir
    return Path(chosen) / "programs" if chosen and config.jax_enable_compilation_cache and "://" not in chosen else None


def key(
    placement: Placement, function: Callable, static: dict[str, Any], shapes: Any, donate: tuple, options: Any
) -> str | None:
    """The name of a program, or None if it cannot be kept: its function is not part of this package, or its trace is
    recorded."""
    if directory() is None or dispatch.recording() or not function.__module__.startswith(f"{__package__}."):
        return None
    parts = (
        _code(),
        sys.version,
        [module.__version__ for module in (jax, jaxlib, flax)],
        _settings(),
        [(device.device_kind, device.id, device.client.platform_version) for device in placement.devices],
        (dict(placement.mesh.shape), sorted(placement.rules.items()), dispatch.target()),
        _processor() if placement.platform == "cpu" else "",
        (function.__module__, function.__qualname__, sorted(static.items())),
        (shapes, donate, options),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def load(name: str, placement: Placement) -> Any:
    """The compiled program with this name, or None if there is no usable one."""
    path = _path(name)
    if reason := cache.distrusted(path.parent):
        _LOG.info("no program is taken from %s: %s", path.parent, reason)
        return None
    try:
        content = cache.read_sealed(path)
        if content is None:
            return _unusable(path, "it is damaged")
        payload, ins, outs = pickle.loads(content)
        os.utime(path)
        from jax.experimental import serialize_executable

        return serialize_executable.deserialize_and_load(payload, ins, outs, execution_devices=placement.devices)
    except FileNotFoundError:
        return None
    except Exception as error:
        return _unusable(path, error)


def save(name: str, compiled: Any) -> None:
    """Keeps a program that has just been compiled. If that fails, it is compiled again next time."""
    path = _path(name)
    try:
        from jax.experimental import serialize_executable

        cache.write_sealed(path, pickle.dumps(serialize_executable.serialize(compiled)))
        _make_room(path.parent)
    except Exception as error:
        _LOG.info("program %s was not kept: %s", name, error)


def _path(name: str) -> Path:
    found = directory()
    assert found is not None
    return found / name


def _unusable(path: Path, error: object) -> None:
    _LOG.info("%s cannot be used and is dropped: %s", path, error)
    with contextlib.suppress(OSError):
        path.unlink()


def _make_room(folder: Path) -> None:
    files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder) if entry.is_file())
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= _LIMIT:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


@functools.cache
def _code() -> str:
    """A digest of the sources of these packages."""
    digest = hashlib.blake2b(digest_size=16)
    for package in _PACKAGES:
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".cc", ".h"):
                digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _settings() -> list[tuple[str, str]]:
    """JAX's settings in this thread, and the environment variables that XLA reads."""
    names = (name for name in jax.config.values if "cache" not in name)
    settings = {name: repr(getattr(jax.config, name, jax.config.values[name])) for name in names}
    flags = {name: value for name, value in os.environ.items() if name.startswith(_READ_BY_XLA)}
    return sorted((settings | flags).items())


def _processor() -> tuple[Any, ...]:
    """The properties of the CPU that XLA's code depends on, and the C++ kernels, which must be loaded when the program runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _instructions(), cores, native.isa()


@functools.cache
def _instructions() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "") + platform.machine()
    return platform.machine() + platform.processor()
