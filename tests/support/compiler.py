"""The mark of tests that need the C++ kernels: skipped if no compiler is found, unless CI is set."""

import os

import pytest

from pallas_kernels.native import build

needs_compiler = pytest.mark.skipif(
    build._compiler() is None and not os.environ.get("CI"), reason="there is no C++ compiler here; plain XLA serves"
)
