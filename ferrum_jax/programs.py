"""Ahead-of-time compiled programs, one for each function, static choice and shape.

A `Compiled` object cannot retrace, so an unexpected shape is an error and not a silent compilation. Compile time is counted
separately from run time. XLA's persistent cache is on from the first program, for small programs too, and whole programs are
kept next to it (`program_store`). If memory runs out while compiling, running or reading results, the error says how much the
program needs.
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
from ferrum_jax.distributed import Placement
from ferrum_jax.mapped import mapped
from ferrum_jax.state import DecodeState, KVCache
from ferrum_jax.units import readable_bytes
from pallas_kernels import cache

_LOG = logging.getLogger(__name__)

# With LLVM's third level, the loops reload the layer index for each weight and the unpacking of most formats is not vectorized.
# With the second level it runs up to twice as fast, and compiles faster.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 2}}


class Programs:
    """Compiles programs at first use and keeps them. `compile_s`: seconds spent on tracing and compiling so far.

    Raises OutOfMemoryError if the device does not have the memory.
    """

    def __init__(self, placement: Placement):
        self.placement = placement
        self.compile_s = 0.0
        self._compiled: dict[Any, Program] = {}
        self._tables: dict[Any, dict[Any, Callable]] = {}
        self._newest: Program | None = None

    @property
    def compiled(self) -> int:
        """The number of programs."""
        return len(self._compiled)

    def table(self, key: Any) -> dict[Any, Callable]:
        """A table of programs by names of its owner: the same one each time, so that the next owner with an equal key does not
        have to describe their arguments again."""
        return self._tables.setdefault(key, {})

    def run(self, function: Callable, *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
        """function(*args, **static) as one program; `donate` has the positions of donated arguments."""
        return self.get(function, *args, donate=donate, **static)(*args)

    def get(self, function: Callable, *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Program:
        """The compiled program for arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s)."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((jax.numpy.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
        key = (function, tuple(sorted(static.items())), structure, shapes)
        if key not in self._compiled:
            begin = time.perf_counter()
            name = getattr(function, "__name__", "a program").strip("_")
            with (
                progress.task(f"compiling {name} (program {len(self._compiled) + 1})"),
                self.placement.as_default(),
                memory.explained(self.placement, lambda: _count(jax.eval_shape(lambda *args: args, *args))),
            ):
                compiled = self._compile(function, args, donate, static, key[2:])
            self._compiled[key] = Program(compiled, self.placement)
            self.compile_s += time.perf_counter() - begin
        self._newest = self._compiled[key]
        return self._newest

    def _compile(self, function: Callable, args: tuple, donate: tuple[int, ...], static: dict[str, Any], shapes: tuple) -> Any:
        """The program from disk, or compiled and then kept on disk."""
        options = COMPILER_OPTIONS.get(self.placement.platform)
        name = program_store.key(self.placement, function, static, shapes, donate, options)
        if name is not None and (kept := program_store.load(name, self.placement)) is not None:
            return kept

        whole, shardings = mapped(self.placement, function, args, static)

        def program(*args: Any) -> Any:
            return whole(*args)

        # A unique name, so that XLA's cache cannot have it: a CPU program from there lacks what `save` needs.
        program.__name__ = getattr(function, "__name__", "program") + (f"_{secrets.token_hex(4)}" if name else "")
        placed = {} if shardings is None else {"in_shardings": shardings}
        compiled = jax.jit(program, donate_argnums=donate, **placed).lower(*args).compile(options)
        if name is not None:
            program_store.save(name, compiled)
        return compiled

    def fetch(self, results: Any) -> Any:
        """Copies the results of a program to the host. Errors that an accelerator met while it computed are raised here."""
        with memory.explained(self.placement, lambda: self._newest.count() if self._newest else "reading results"):
            return jax.device_get(results)


class Program:
    """A compiled program, called with its arguments."""

    def __init__(self, compiled: Any, placement: Placement):
        self.compiled, self.placement = compiled, placement

    def __call__(self, *args: Any) -> Any:
        with memory.explained(self.placement, self.count):
            return self.compiled(*args)

    def count(self) -> str:
        """The memory that the program needs, in words."""
        args, _ = self.compiled.in_avals
        return _count(args, self.compiled.memory_analysis())


def _count(args: Any, analysis: Any = None) -> str:
    """The bytes of a program's arguments, and of its temporaries and results if the compiler's analysis is given."""
    caches = [leaf for leaf in jax.tree.leaves(args, is_leaf=_is_cache) if _is_cache(leaf)]
    cache = memory.nbytes(caches)
    parts = {"weights and inputs": memory.nbytes(args) - cache, "KV cache": cache}
    if analysis is not None:
        parts["temporaries"] = analysis.temp_size_in_bytes
        parts["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    sizes = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items() if size > 0)
    return f"the program takes {sizes}"


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache | DecodeState)


def enable_compilation_cache() -> Path:
    """Turns XLA's persistent cache on and returns its folder. A cache that the user has configured stays as it is, and one
    whose folder cannot be made private stays off."""
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
