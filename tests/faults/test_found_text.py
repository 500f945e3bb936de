"""Faults of texts, templates and vocabularies that users met, each put back into our own source: its guard has to notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_continuation_text as continuation
from patching import Fault, applied

from ferrum_jax.tokenizer import TextStream

FAULTS = {
    "first space": Fault(
        "what goes on from a prompt loses its first space",
        TextStream.__init__,
        "if not silent:",
        "if False:",
        lambda path: continuation.test_of_a_directory("spm", path),
    ),
    "cut character": Fault(
        "the bytes of a character that the prompt began are forgotten",
        TextStream.__init__,
        "self._decoder.decode(tail[-3:])",
        "self._decoder.decode(b'')",
        lambda path: continuation.test_of_a_directory("bytes", path),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_holds_and_notices(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    for part in ("sound", "faulty"):
        (tmp_path / part).mkdir()
    fault.guard(tmp_path / "sound")
    with applied(fault), pytest.raises((Exception, pytest.fail.Exception)):
        fault.guard(tmp_path / "faulty")
