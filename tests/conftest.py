"""Options of the test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-mutations", type=int, default=2000, metavar="N", help="damaged GGUF files the fuzz test makes (2000)"
    )
