"""What several tests use: models made from seeds, the cases of goldens, stand-ins for devices and servers, child processes.

pytest's `pythonpath` has the folder of the tests, so that `support` is a package everywhere; a child process that imports it
gets `environment()`.
"""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"


def environment(**more: str) -> dict[str, str]:
    """Of a child process that imports `support` and the tests, and ferrum_jax from where this process has it: not from the
    folder that it is started in."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **more}
