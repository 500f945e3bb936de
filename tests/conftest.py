"""Options of the test suite, and what keeps its tests apart."""

import functools
import sys
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("support")

from support import ROOT  # noqa: E402

sys.path.append(str(ROOT))  # benchmarks and training; after site-packages: ferrum_jax is the one that is installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-mutations", type=int, default=2000, metavar="N", help="damaged GGUF files the fuzz test makes (2000)"
    )


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """No test meets a program that another one has changed the making of; those of the store say where it is."""
    from ferrum_jax import program_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_store, "directory", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built(nothing_kept: None) -> None:
    """Before any test changes where they are kept or what they are compiled with: the answer holds for the process."""
    from pallas_kernels import native

    native.prepare()


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question for the C++ kernels is open again inside the test, and has its old answer afterwards."""
    from pallas_kernels.native import build

    monkeypatch.setattr(build, "library", functools.cache(build.library.__wrapped__))
