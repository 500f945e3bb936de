"""Options of the test suite."""

from collections.abc import Iterator

import pytest


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
