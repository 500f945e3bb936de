"""Where the sections do their device work: programs are compiled ahead of time and run and timed, or only collected.

In a `Lab` that collects, `run` records the program and returns the shapes of its results. The same section code thus measures
on a device, checks itself on a CPU at small shapes, and lists what has to compile for an absent device. Code that looks at
values comes after `if lab.collecting: return`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.sizes import Sizes
from ferrum_jax.distributed import Placement
from ferrum_jax.programs import COMPILER_OPTIONS, Programs
from pallas_kernels import aot, dispatch


@dataclasses.dataclass(frozen=True)
class Program:
    """A call of `Lab.run`, with shapes for arguments; `options`: compiler options in addition to the package's own."""

    function: Callable
    args: tuple
    donate: tuple[int, ...]
    static: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The function and the shapes of its small arguments."""
        leaves = [leaf for leaf in jax.tree.leaves(self.args) if leaf.ndim and leaf.size < 1 << 24]
        shapes = " ".join(dict.fromkeys("x".join(map(str, leaf.shape)) for leaf in leaves[-3:]))
        return f"{self.function.__name__} {shapes}".rstrip()

    def compile_for(self, target: str) -> jax.stages.Compiled:
        """Compiles it ahead of time, as the package does for this kind of device."""
        platform = aot.TARGETS[target].target.platform
        options = COMPILER_OPTIONS.get(platform, {}) | self.options
        whole = functools.partial(self.function, **self.static)
        return aot.compile_for(target, whole, *self.args, donate_argnums=self.donate, compiler_options=options or None)


class Lab:
    """`device` None: programs are collected for `target`, not run. `rehearsal`: programs that another section or a test
    compiles too may be left out."""

    def __init__(
        self, sizes: Sizes, device: jax.Device | None, target: dispatch.Target | None = None, *, rehearsal: bool = False
    ):
        self.sizes, self.device, self.rehearsal = sizes, device, rehearsal
        self.target = target or dispatch.target_of(device)
        self.collecting = device is None
        self.programs = None if device is None else Programs(Placement.of(device))
        self.collected: dict[Any, tuple[Program, Any]] = {}
        self.compiled: Callable[[], Any] = lambda: None
        self._options: dict[str, Any] = {}
        self._backends: dict[int, list[dispatch.Choice]] = {}

    @property
    def has_kernels(self) -> bool:
        """Whether the package has kernels for the target."""
        return self.target.capability >= (8, 0)

    def run(self, function: Callable, *args, donate: tuple[int, ...] = (), **static):
        """function(*args, **static) as one program: its results, or their shapes."""
        if self.collecting:
            return self._collect(function, args, donate, static)
        return self.program(function, *args, donate=donate, **static)(*args)

    def program(self, function: Callable, *args, donate: tuple[int, ...] = (), **static) -> Any:
        """The `ferrum_jax.programs.Program` of `run`; not while collecting."""
        assert self.programs is not None
        with dispatch.record() as choices:
            program = self.programs.get(function, *args, donate=donate, **static)
        self._backends.setdefault(id(program), choices)
        return program

    def backends(self, function: Callable, *args, **static) -> str:
        """Which backends the dispatcher took when the program was traced."""
        choices = self._backends[id(self.program(function, *args, **static))]
        return ", ".join(sorted({choice.backend for choice in choices}))

    def put(self, tree):
        """Moves host arrays to the device; leaves them in place while collecting."""
        return tree if self.collecting else jax.tree.map(jnp.asarray, tree)

    def seconds(self, work: Callable[[], Any], rounds: int | None = None) -> list[float]:
        """Wall time of each of `rounds` calls of `work`, until its result is ready, after one call to warm up."""
        taken = []
        for number in range((rounds or self.sizes.rounds) + 1):
            begin = time.perf_counter()
            result = work()
            if self.collecting:
                return [1.0]
            jax.block_until_ready(result)
            if number:
                taken.append(time.perf_counter() - begin)
        return taken

    @contextlib.contextmanager
    def options(self, **options) -> Iterator[None]:
        """Programs run inside the block are compiled anew, with these compiler options in addition to the package's."""
        platform = self.target.platform
        package, before = COMPILER_OPTIONS.get(platform), (self.programs, self._options)
        COMPILER_OPTIONS[platform], self._options = (package or {}) | options, options
        if self.device is not None:
            self.programs = Programs(Placement.of(self.device))
        try:
            yield
        finally:
            self.programs, self._options = before
            COMPILER_OPTIONS.pop(platform)
            if package is not None:
                COMPILER_OPTIONS[platform] = package

    def ahead(self, work: Callable[[Lab], Any]) -> None:
        """Compiles the programs that `work(lab)` runs in parallel. One that fails is passed over here: it fails again where it
        is used.

        `self.compiled` is called after each. Does nothing if BENCHMARK_ONE_BY_ONE is set, for compilers that abort the process:
        then the parent learns which program was to blame."""
        if self.collecting or os.environ.get("BENCHMARK_ONE_BY_ONE"):
            return
        scout = Lab(self.sizes, None, self.target)
        work(scout)

        def compile(program: Program) -> None:
            with contextlib.suppress(Exception):
                self.program(program.function, *program.args, donate=program.donate, **program.static)
            self.compiled()

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile, [program for program, _ in scout.collected.values()]))

    def _collect(self, function, args, donate, static):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.result_type(a)), args)
        leaves, structure = jax.tree.flatten(shapes)
        key = (function, structure, tuple(leaves), tuple(sorted(static.items())), tuple(sorted(self._options.items())))
        if key not in self.collected:
            with dispatch.on(self.target):
                results = jax.eval_shape(functools.partial(function, **static), *shapes)
            self.collected[key] = Program(function, shapes, donate, static, self._options), results
        return self.collected[key][1]
