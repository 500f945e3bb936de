"""Faults of reading answers while they arrive, each put into our own source: its guard must fail."""

from __future__ import annotations

import pytest

from ferrum_jax.parsing import parser
from ferrum_jax.parsing.reader import Reader
from support.patching import Fault, applied
from unit.parsing import test_parsing as guards

FAULTS = {
    "dropped": Fault(
        "what arrives together with the end of the thinking is dropped",
        parser._reasoning,
        "    r.forget()",
        '    r.text, r.at = "", 0',
        guards.test_it_does_not_matter_where_a_text_is_cut,
    ),
    "late": Fault(
        "the first text after the thinking is told as a part of it, if its mark arrives in two pieces",
        Reader._find,
        "not self.ended and any(",
        "False and any(",
        guards.test_it_does_not_matter_where_a_text_is_cut,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name: str) -> None:
    with applied(FAULTS[name]), pytest.raises((AssertionError, ExceptionGroup)):
        FAULTS[name].guard()
