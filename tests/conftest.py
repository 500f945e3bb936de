"""Options of the test suite, the order of its tests and how long they take, and what keeps them apart.

`slow` are the tests of SLOW folders and those marked one by one; files that have some come first, so that two workers end
together.
`--durations-file FILE` writes the seconds of every test, the longest first.
"""

import fcntl
import functools
import gc
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("support")

from support import ROOT, TESTS  # noqa: E402

sys.path.append(str(ROOT))  # benchmarks and training; after site-packages: ferrum_jax is the one that is installed

MAPS = 16_000  # of the 65,530 memory maps that Linux allows a process; XLA takes some for every compiled program

SLOW = ("aot", "native", "real")  # whole folders: compilers for other devices, sanitizers, models of 100 MB and more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-mutations", type=int, default=2000, metavar="N", help="damaged GGUF files the fuzz test makes (2000)"
    )
    parser.addoption("--durations-file", type=Path, metavar="FILE", help="writes the seconds of every test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background job; some tests interrupt themselves
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if file := config.getoption("--durations-file"):
        config.pluginmanager.register(Durations(file))


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.relative_to(TESTS).parts[0] in SLOW:
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Each worker gets half of the tests, and one that is done takes over tests that the other has not begun."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


class Durations:
    """Seconds of every test, its fixtures included, for the file that the option names."""

    def __init__(self, file: Path) -> None:
        self.file, self.seconds = file, defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):  # workers send their reports to the process that started them
            longest = sorted(self.seconds.items(), key=lambda pair: -pair[1])
            self.file.write_text("".join(f"{seconds:.2f}\t{test}\n" for test, seconds in longest))


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """No test gets a kept program that another test has compiled differently; the tests of the store set their own folder."""
    from ferrum_jax import program_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_store, "directory", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built(nothing_kept: None) -> None:
    """Builds the kernels before a test changes where they are kept or how they are compiled, because this is decided once per
    process."""
    from pallas_kernels import native

    native.prepare()


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops the programs that JAX keeps before there are more than a process can map: XLA then ends the process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """`once(name, make)`: the result of `make` (JSON data), made by the first worker that needs it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers of this run

    def read(name: str, make: Callable[[], Any]) -> Any:
        made = folder / f"{name}.json"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_text(json.dumps(make()))
        return json.loads(made.read_text())

    return read


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the test the C++ kernels are looked up again; afterwards the old result is back."""
    from pallas_kernels.native import build

    monkeypatch.setattr(build, "library", functools.cache(build.library.__wrapped__))
