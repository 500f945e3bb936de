"""Which backend serves an operation, and the record of what was chosen.

Each operation lists its backends in order of preference. A backend says for the case at hand either None ("I can") or
why it cannot; the first that can is taken. The choice is made while a program is traced, and whoever wants to see it
traces inside `record()`: that is what `ferrum-jax doctor` prints, so it cannot differ from what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """What a backend needs to know to decide: platform ("cpu", "gpu", "tpu"), block format or KV dtype, compute dtype."""

    operation: str
    platform: str
    format: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, why it cannot serve a case (None: it can), and its functions."""

    name: str
    refuses: Callable[[Case], str | None]
    functions: Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision. `reason` says why the backends before the chosen one were passed over."""

    operation: str
    platform: str
    format: str
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


def choose(case: Case, backends: Sequence[Backend]) -> Any:
    """The functions of the first backend that can serve the case. The last backend of an operation always can."""
    passed: list[str] = []
    for backend in backends:
        refusal = backend.refuses(case)
        if refusal is None:
            choice = Choice(case.operation, case.platform, case.format, backend.name, "; ".join(passed) or "first choice")
            for choices in _records.get():
                if choice not in choices:
                    choices.append(choice)
            return backend.functions
        passed.append(f"{backend.name}: {refusal}")
    raise ValueError(f"no backend for {case}: {'; '.join(passed)}")
