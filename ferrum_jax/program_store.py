"""Compiled programs on disk, so that a start which meets one neither traces, lowers nor compiles it.

XLA's persistent cache saves the compilation alone: a program has to be traced and lowered before it can be looked up,
which takes longer than loading it. Here a program is found by what decides what tracing would give (`key`): the code of
these packages, the versions and settings of JAX, the device, and the function with its static choices and shapes. What is
in doubt makes another key, never another program under the same one.

The files lie in a folder next to XLA's. They are run as they are, so one that is damaged is dropped unread, and none is read
from a folder that others can write to (`pallas_kernels.cache`).
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
from pallas_kernels import cache, dispatch, native

_LOG = logging.getLogger(__name__)
_LIMIT = 1 << 30  # bytes of all programs; beyond, those unused for longest go
_READ_BY_XLA = ("XLA_", "LIBTPU_", "TF_", "NPROC")  # beginnings of names of environment variables
_PACKAGES = (Path(__file__).parent, Path(pallas_kernels.__file__).parent)


def directory() -> Path | None:
    """Where programs are kept: beside XLA's persistent cache, None where that is off."""
    config: Any = jax.config
    chosen = config.jax_compilation_cache_dir
    return Path(chosen) / "programs" if chosen and config.jax_enable_compilation_cache and "://" not in chosen else None


def key(device: jax.Device, function: Callable, static: dict[str, Any], shapes: Any, donate: tuple, options: Any) -> str | None:
    """The name of a program; None for one that cannot be kept: of a function from elsewhere, or whose trace is recorded."""
    if directory() is None or dispatch.recording() or not function.__module__.startswith(f"{__package__}."):
        return None
    parts = (
        _code(),
        sys.version,
        [module.__version__ for module in (jax, jaxlib, flax)],
        _settings(),
        (device.platform, device.device_kind, device.id, device.client.platform_version, str(dispatch.target())),
        _processor() if device.platform == "cpu" else "",
        (function.__module__, function.__qualname__, sorted(static.items())),
        (shapes, donate, options),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def load(name: str, device: jax.Device) -> Any:
    """The compiled program of this name, None where there is none that can be used."""
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

        return serialize_executable.deserialize_and_load(payload, ins, outs, execution_devices=[device])
    except FileNotFoundError:
        return None
    except Exception as error:
        return _unusable(path, error)


def save(name: str, compiled: Any) -> None:
    """Keeps a program that was compiled just now. Where that cannot be done nothing happens: it is compiled again."""
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
    """JAX's settings as they are in this thread, and what XLA reads from the environment."""
    names = (name for name in jax.config.values if "cache" not in name)
    settings = {name: repr(getattr(jax.config, name, jax.config.values[name])) for name in names}
    flags = {name: value for name, value in os.environ.items() if name.startswith(_READ_BY_XLA)}
    return sorted((settings | flags).items())


def _processor() -> tuple[Any, ...]:
    """What XLA's code for a CPU depends on, and the kernels beside it, which have to be there when the program runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _instructions(), cores, native.isa()


@functools.cache
def _instructions() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "") + platform.machine()
    return platform.machine() + platform.processor()
