"""Ahead-of-time compiled programs, one for each function, static choice and shape.

A `Compiled` object cannot retrace: a shape that nobody foresaw is an error and not a silent compilation. Compile time is
counted apart from run time. XLA's persistent cache is on from the first program, small ones included, and whole programs
are kept beside it (`program_store`). Where memory runs out, in compiling, running or reading results, the error counts what
the program takes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ferrum_jax import memory, program_store, progress
from ferrum_jax.kv_cache import KVCache
from ferrum_jax.units import readable_bytes
from pallas_kernels import cache

_LOG = logging.getLogger(__name__)

# LLVM's third level promotes the layer index to an argument that the loops then reload for each weight, and the unpacking
# of most formats is no longer vectorised: the second level runs it up to twice as fast and compiles faster.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 2}}


class Programs:
    """Compiles on first use and keeps. `compile_s`: seconds spent in tracing and compilation so far.

    Raises OutOfMemoryError where the device has not the memory.
    """

    def __init__(self, platform_device: jax.Device):
        self.device = platform_device
        self.compile_s = 0.0
        self._compiled: dict[Any, Program] = {}
        self._newest: Program | None = None

    @property
    def compiled(self) -> int:
        """How many programs there are."""
        return len(self._compiled)

    def run(self, function: Callable, *args, donate: tuple[int, ...] = (), **static):
        """function(*args, **static) as one program; `donate` are positions of arguments that are given up."""
        return self.get(function, *args, donate=donate, **static)(*args)

    def get(self, function: Callable, *args, donate: tuple[int, ...] = (), **static) -> Program:
        """The compiled program for arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s)."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((jax.numpy.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
        key = (function, tuple(sorted(static.items())), structure, shapes)
        if key not in self._compiled:
            begin = time.perf_counter()
            name = getattr(function, "__name__", "a program").strip("_")
            with (
                progress.task(f"compiling {name} (program {len(self._compiled) + 1})"),
                jax.default_device(self.device),
                memory.explained(self.device, lambda: _count(jax.eval_shape(lambda *args: args, *args))),
            ):
                compiled = self._compile(function, args, donate, static, key[2:])
            self._compiled[key] = Program(compiled, self.device)
            self.compile_s += time.perf_counter() - begin
        self._newest = self._compiled[key]
        return self._newest

    def _compile(self, function: Callable, args: tuple, donate: tuple[int, ...], static: dict[str, Any], shapes: tuple) -> Any:
        """The program as it was kept on disk, or compiled and then kept."""
        options = COMPILER_OPTIONS.get(self.device.platform)
        name = program_store.key(self.device, function, static, shapes, donate, options)
        if name is not None and (kept := program_store.load(name, self.device)) is not None:
            return kept

        def program(*args):
            return function(*args, **static)

        # A name of its own, or XLA's cache may have it: from there a CPU's program comes without what `save` needs.
        program.__name__ = getattr(function, "__name__", "program") + (f"_{secrets.token_hex(4)}" if name else "")
        compiled = jax.jit(program, donate_argnums=donate).lower(*args).compile(options)
        if name is not None:
            program_store.save(name, compiled)
        return compiled

    def fetch(self, results: Any) -> Any:
        """The results of a program on the host; here errors appear that an accelerator met while it computed."""
        with memory.explained(self.device, lambda: self._newest.count() if self._newest else "reading results"):
            return jax.device_get(results)


class Program:
    """A compiled program, called with its arguments."""

    def __init__(self, compiled: Any, device: jax.Device):
        self.compiled, self.device = compiled, device

    def __call__(self, *args):
        with memory.explained(self.device, self.count):
            return self.compiled(*args)

    def count(self) -> str:
        """What the program takes, in words."""
        args, _ = self.compiled.in_avals
        return _count(args, self.compiled.memory_analysis())


def _count(args: Any, analysis: Any = None) -> str:
    """The bytes of a program's arguments, and of its temporaries and results where the compiler has said them."""
    caches = [leaf for leaf in jax.tree.leaves(args, is_leaf=_is_cache) if _is_cache(leaf)]
    cache = memory.nbytes(caches)
    parts = {"weights and inputs": memory.nbytes(args) - cache, "KV cache": cache}
    if analysis is not None:
        parts["temporaries"] = analysis.temp_size_in_bytes
        parts["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    sizes = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items() if size > 0)
    return f"the program takes {sizes}"


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)


def enable_compilation_cache() -> Path:
    """Turns XLA's persistent cache on, unless the user has chosen a place for it or code is not to be kept there, and returns
    the place."""
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if not chosen:
        chosen = str(cache.cache_root() / "xla")
        try:
            cache.make_private(Path(chosen))
        except OSError as error:
            _LOG.warning("compiled programs are not kept, so each start compiles again: %s", error)
            return Path(chosen)
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Path(chosen)
