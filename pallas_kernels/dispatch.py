"""The backend choice: which backend serves an operation on the device at hand, and the record of what was chosen.

Each operation lists its backends in order of preference. For a given case a backend returns either None ("I can") or the reason
why it cannot; the first that can is taken, or the one that the caller forces with `implementation=`. The choice is made while a
program is traced and is visible when tracing inside `record()`: that is what `ferrum-jax doctor` prints, so it cannot differ
from what runs.

A program is traced for a `Target`: that of the default device, or inside `on(...)` one that need not exist (see aot.py),
together with the forced backends. JAX does not include that context in its caches, so a function that JAX caches takes the
target as a static argument; therefore a call with a forced backend and one without never share a trace.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

_TPU_GENERATIONS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


# What operations take as `implementation=`: None, the name of a backend, or (operation, backend) pairs, of which those for the
# operation itself and for the operations that it is composed of count.
Implementation = str | tuple[tuple[str, str], ...] | None


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device: platform "cpu", "gpu" or "tpu", and its model: the compute capability of a GPU ("9.0"), the generation
    of a TPU ("v5e"), "" for a CPU. `forced`: the operations whose backend is forced."""

    platform: str
    model: str = ""
    forced: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.platform} {self.model}".rstrip()

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) if there is none."""
        major, _, minor = self.model.partition(".")
        return (int(major), int(minor)) if self.platform == "gpu" and major.isdigit() and minor.isdigit() else (0, 0)


def target_of(device: jax.Device) -> Target:
    """The target of an existing device."""
    if device.platform == "gpu":
        return Target("gpu", str(getattr(device, "compute_capability", "")))
    if device.platform == "tpu":
        kind = device.device_kind.removeprefix("TPU ")
        return Target("tpu", _TPU_GENERATIONS.get(kind, kind))
    return Target(device.platform)


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target(operation: str = "", implementation: Implementation = None) -> Target:
    """The target being traced for, combined with an operation's `implementation=`."""
    found = _target.get()
    if found is None:
        config: Any = jax.config
        device = config.jax_default_device
        if isinstance(device, str):
            device = jax.devices(device)[0]
        found = target_of(device or jax.devices()[0])
    if implementation:
        pairs = ((operation, implementation),) if isinstance(implementation, str) else implementation
        found = dataclasses.replace(found, forced=tuple(sorted((dict(found.forced) | dict(pairs)).items())))
    return found


@contextlib.contextmanager
def on(target: Target) -> Iterator[None]:
    """Traces inside the block are for `target`, whichever devices exist."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts by which a backend decides: the target, the block format or KV dtype, the dtype of the arithmetic, the memory
    layout of the weights on the device, the sizes that the operation's contract names, and the parts of the contract that not
    every call needs and this one does."""

    operation: str
    target: Target
    format: str
    dtype: str
    memory_layout: str = "ggml"
    shape: tuple[int, ...] = ()
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.format} (memory layout {self.memory_layout}) in {self.dtype} on {self.target}, sizes {list(self.shape)}"
        return f"{text}, with {' and '.join(self.features)}" if self.features else text


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, why it cannot serve a case (None: it can), and the function that returns its functions.
    `parts`: the operations that it is composed of; it has the features that they have. `features`: those of cases that it
    has."""

    name: str
    refuses: Callable[[Case], str | None]
    functions: Callable[[], Any]
    parts: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def refusal(self, case: Case) -> str | None:
        """Why it cannot serve the case; None: it can."""
        missing = [feature for feature in case.features if feature not in self.features and not self.parts]
        return self.refuses(case) or (f"has no {' and no '.join(missing)}" if missing else None)


def composed(*parts: str) -> Backend:
    """A backend that consists of other operations, one after the other, each with a backend that serves it."""
    return Backend("composed", lambda case: None, lambda: None, parts)


def kernels(name: str, package: str, platform: str, features: tuple[str, ...] = ()) -> Backend:
    """The backend in the module `name` of a package, with the module's `refuses`, for devices of one platform: on others
    neither the module nor Pallas is imported."""

    def module() -> Any:
        return importlib.import_module(f"{package}.{name}")

    def refuses(case: Case) -> str | None:
        return module().refuses(case) if case.target.platform == platform else _PLATFORMS[platform]

    return Backend(name, refuses, module, features=features)


_PLATFORMS = {"cpu": "for CPUs", "gpu": "for NVIDIA GPUs", "tpu": "for TPUs"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One backend choice. `reason` says why the backends before this one were not taken, or that it was forced."""

    operation: str
    target: str
    format: str
    memory_layout: str
    backend: str
    reason: str


_records: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar("backend_choices", default=())


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collects the choices made while tracing inside the block; each distinct one once."""
    choices: list[Choice] = []
    token = _records.set((*_records.get(), choices))
    try:
        yield choices
    finally:
        _records.reset(token)


def recording() -> bool:
    """Whether choices are being collected."""
    return bool(_records.get())


def choose(case: Case, backends: Sequence[Backend]) -> Any:
    """The functions of the backend that serves the case: of the forced one, else of the first that can.

    Raises:
      ValueError: for a forced backend that does not exist or cannot serve the case.
    """
    name, reason = _forced(case, backends)
    if name:
        backend = next(backend for backend in backends if backend.name == name)
        if refusal := backend.refusal(case):
            raise ValueError(f"{case.operation}: the forced implementation {name!r} cannot serve {case}: {refusal}")
        return _taken(case, backend, reason)
    passed: list[str] = []
    for backend in backends:
        refusal = backend.refusal(case)
        if refusal is None:
            return _taken(case, backend, "; ".join(passed) or "first choice")
        passed.append(f"{backend.name}: {refusal}")
    raise ValueError(f"no backend for {case}: {'; '.join(passed)}")


def _forced(case: Case, backends: Sequence[Backend]) -> tuple[str, str]:
    """The name of the forced backend and what forces it; ("", "") if the order decides."""
    forced = dict(case.target.forced)
    if name := forced.get(case.operation):
        known = [backend.name for backend in backends]
        if name not in known:
            raise ValueError(f"{case.operation} has no implementation {name!r}; it has {', '.join(known)}")
        return name, "forced"
    for backend in backends:
        if parts := [part for part in backend.parts if part in forced]:
            return backend.name, f"{', '.join(parts)} forced"
    return "", ""


def _taken(case: Case, backend: Backend, reason: str) -> Any:
    choice = Choice(case.operation, str(case.target), case.format, case.memory_layout, backend.name, reason)
    for choices in _records.get():
        if choice not in choices:
            choices.append(choice)
    return backend.functions()
