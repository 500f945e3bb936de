"""What several tests use: models made from seeds, the cases of goldens, stand-ins for devices and servers, child processes.

pytest's `pythonpath` has the folder of the tests, so that `support` is a package everywhere; a child process that imports it
gets `environment()`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"


def environment(**more: str) -> dict[str, str]:
    """Of a child process that imports `support` and the tests, and ferrum_jax from where this process has it, which need not
    be the folder that it is started in."""
    found = importlib.util.find_spec("ferrum_jax")
    in_clone = found is not None and Path(found.origin or "").parents[1] == ROOT
    path = [str(TESTS), str(ROOT) if in_clone else "", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1", **more}
