"""Shared by several tests: models made from seeds, the cases of goldens, stand-ins for devices and servers, child processes.

pytest's `pythonpath` has the folder of the tests, so that `support` can be imported everywhere; a child process that imports it
needs `environment()`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process that imports `support` and the tests, and the same ferrum_jax as this process, from
    whichever folder it is started in."""
    found = importlib.util.find_spec("ferrum_jax")
    in_clone = found is not None and Path(found.origin or "").parents[1] == ROOT
    path = [str(TESTS), str(ROOT) if in_clone else "", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1", **more}
