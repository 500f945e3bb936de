"""Programs compiled for absent devices, which needs the wheels of the `aot` extra. Without them these tests fail if CI is set,
and are skipped otherwise."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pallas_kernels import aot
from support import environment


def pytest_collection_modifyitems(items) -> None:
    absent = [why for why in (aot.missing("h200"), aot.missing("v5e")) if why]
    here = [item for item in items if "aot" in item.path.parts]
    if absent and here and not os.environ.get("CI"):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=f"needs {absent[0]}"))


@pytest.fixture(scope="session")
def compiled_by(once: Callable) -> Callable[[str, str], Any]:
    """`compiled_by(module, target)`: what `python -m support.aot.MODULE TARGET` prints, run once for all workers."""

    def run(module: str, target: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", f"support.aot.{module}", target]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1500, check=False)
        return done.returncode, done.stdout, done.stderr[-3000:]

    @functools.cache
    def read(module: str, target: str) -> Any:
        code, out, err = once(f"{module}-{target}", lambda: run(module, target))
        assert code == 0, err
        return json.loads(out)

    return read
