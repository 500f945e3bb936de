"""The tiny encoders of tests/goldens/encoders, for tests."""

from __future__ import annotations

import sys
from pathlib import Path

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "encoders"
sys.path.insert(0, str(GOLDENS))
import tiny_encoders as tiny_encoders  # noqa: E402
