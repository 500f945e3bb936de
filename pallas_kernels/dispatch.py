"""Which backend serves an operation on the device at hand, and the record of what was chosen.

Each operation lists its backends in order of preference. A backend says for the case at hand either None ("I can") or
why it cannot; the first that can is taken. The choice is made while a program is traced, and whoever wants to see it
traces inside `record()`: that is what `ferrum-jax doctor` prints, so it cannot differ from what runs.

What is traced for is a `Target`: the default device's, or inside `on(...)` one that need not be there (see aot.py). JAX
does not know of that context, so a function that JAX caches takes the target as a static argument.
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


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device: platform "cpu", "gpu" or "tpu", and its model: the compute capability of a GPU ("9.0"), the
    generation of a TPU ("v5e"), "" of a CPU."""

    platform: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.platform} {self.model}".rstrip()

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) where there is none."""
        major, _, minor = self.model.partition(".")
        return (int(major), int(minor)) if self.platform == "gpu" and major.isdigit() and minor.isdigit() else (0, 0)


def target_of(device: jax.Device) -> Target:
    """The kind of a device that is there."""
    if device.platform == "gpu":
        return Target("gpu", str(getattr(device, "compute_capability", "")))
    if device.platform == "tpu":
        kind = device.device_kind.removeprefix("TPU ")
        return Target("tpu", _TPU_GENERATIONS.get(kind, kind))
    return Target(device.platform)


_chosen: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """What is being traced for."""
    if (chosen := _chosen.get()) is not None:
        return chosen
    config: Any = jax.config
    device = config.jax_default_device
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return target_of(device or jax.devices()[0])


@contextlib.contextmanager
def on(chosen: Target) -> Iterator[None]:
    """Traces inside the block are for `chosen`, whatever devices there are."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a backend needs to know to decide: the target, the block format or KV dtype, the dtype of the arithmetic, the
    layout of the weights on the device, and the sizes that the operation's contract names."""

    operation: str
    target: Target
    format: str
    dtype: str
    layout: str = "ggml"
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, why it cannot serve a case (None: it can), and what gives its functions."""

    name: str
    refuses: Callable[[Case], str | None]
    functions: Callable[[], Any]


def kernels(name: str, package: str, platform: str) -> Backend:
    """The backend in the module `name` of a package, its `refuses` included, which serves devices of one platform: elsewhere
    neither it nor Pallas is imported."""

    def module() -> Any:
        return importlib.import_module(f"{package}.{name}")

    def refuses(case: Case) -> str | None:
        return module().refuses(case) if case.target.platform == platform else _PLATFORMS[platform]

    return Backend(name, refuses, module)


_PLATFORMS = {"gpu": "for NVIDIA GPUs", "tpu": "for TPUs"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision. `reason` says why the backends before the chosen one were passed over."""

    operation: str
    target: str
    format: str
    layout: str
    backend: str
    reason: str


_records: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar("dispatch_records", default=())


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
    """Whether anybody collects choices."""
    return bool(_records.get())


def choose(case: Case, backends: Sequence[Backend]) -> Any:
    """The functions of the first backend that can serve the case. The last backend of an operation always can."""
    passed: list[str] = []
    for backend in backends:
        refusal = backend.refuses(case)
        if refusal is None:
            reason = "; ".join(passed) or "first choice"
            choice = Choice(case.operation, str(case.target), case.format, case.layout, backend.name, reason)
            for choices in _records.get():
                if choice not in choices:
                    choices.append(choice)
            return backend.functions()
        passed.append(f"{backend.name}: {refusal}")
    raise ValueError(f"no backend for {case}: {'; '.join(passed)}")
