"""Ahead-of-time compiled programs, one for each function, static choice and shape.

A `Compiled` object cannot retrace: a shape that nobody foresaw is an error and not a silent compilation. Compile time is
counted apart from run time, and XLA's persistent cache is on from the first program, small ones included.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# LLVM's third level promotes the layer index to an argument that the loops then reload for each weight, and the unpacking
# of most formats is no longer vectorised: the second level runs it up to twice as fast and compiles faster.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 2}}


class Programs:
    """Compiles on first use and keeps. `compile_s`: seconds spent in tracing and compilation so far."""

    def __init__(self, platform_device: jax.Device):
        self.device = platform_device
        self.compile_s = 0.0
        self._compiled: dict[Any, Any] = {}

    def run(self, function: Callable, *args, donate: tuple[int, ...] = (), **static):
        """function(*args, **static) as one program; `donate` are positions of arguments that are given up."""
        return self.get(function, *args, donate=donate, **static)(*args)

    def get(self, function: Callable, *args, donate: tuple[int, ...] = (), **static):
        """The compiled program for arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s)."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((jax.numpy.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
        key = (function, tuple(sorted(static.items())), structure, shapes)
        if key not in self._compiled:
            begin = time.perf_counter()
            with jax.default_device(self.device):
                jitted = jax.jit(functools.partial(function, **static), donate_argnums=donate)
                self._compiled[key] = jitted.lower(*args).compile(COMPILER_OPTIONS.get(self.device.platform))
            self.compile_s += time.perf_counter() - begin
        return self._compiled[key]


def enable_compilation_cache() -> Path:
    """Turns XLA's persistent cache on, unless the user has chosen a place for it, and returns the place."""
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(base) / "ferrum_jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Path(chosen)
