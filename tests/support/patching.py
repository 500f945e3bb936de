"""A known fault as a change of our own source, applied for the duration of a test.

In the source of one function a snippet is replaced; the function then gets the compiled code, so that all callers see the
fault, whether they use a method or an imported name. A snippet that does not occur exactly once is an error, so that no fault
outlives the code that it is about.
"""

from __future__ import annotations
import __future__

import contextlib
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import jax


class Fault(NamedTuple):
    """In the source of `function` the text `ours` becomes `theirs`; `guard`, called without arguments, must fail."""

    what: str
    function: Callable
    ours: str
    theirs: str
    guard: Callable[[], Any]


def in_folder(test: Callable, *arguments: Any) -> Callable[[], None]:
    """The test with a folder of its own, its last argument."""

    def guard() -> None:
        with tempfile.TemporaryDirectory() as folder:
            test(*arguments, Path(folder))

    return guard


def retraced(test: Callable, *arguments: Any) -> Callable[[], None]:
    """The test with its programs traced anew, before it and after it."""

    def guard() -> None:
        jax.clear_caches()
        try:
            test(*arguments)
        finally:
            jax.clear_caches()

    return guard


@contextlib.contextmanager
def applied(fault: Fault) -> Iterator[None]:
    """Applies the fault while the block runs. LookupError if our source has changed."""
    function: Any = inspect.unwrap(getattr(fault.function, "__func__", fault.function))
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(fault.ours) != 1:
        raise LookupError(f"{function.__qualname__}: {source.count(fault.ours)} times in its source: {fault.ours!r}")
    flags = __future__.annotations.compiler_flag  # annotations may name what only type checkers import
    before = function.__code__
    module = compile(source.replace(fault.ours, fault.theirs), before.co_filename, "exec", flags, dont_inherit=True)
    changed = next(code for code in module.co_consts if isinstance(code, CodeType) and code.co_name == before.co_name)
    function.__code__ = changed
    try:
        yield
    finally:
        function.__code__ = before
