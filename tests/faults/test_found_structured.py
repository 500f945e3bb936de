"""Faults of structured output, each put into our own source: its guard must fail."""

from __future__ import annotations

from functools import partial

import pytest

from ferrum_jax import choice
from ferrum_jax.engine.slots import Slots
from ferrum_jax.structured import schemas
from ferrum_jax.structured.grammar import Follower
from support import guards
from support.patching import Fault, applied
from unit.engine import test_structured as device
from unit.text import test_schemas as texts

FAULTS = {
    "ignored": Fault(
        "a keyword that cannot be done is ignored",
        schemas._Walk.schema,
        "if name in _REFUSED:",
        "if False:",
        partial(texts.test_what_cannot_be_done_is_refused_by_name, "not"),
    ),
    "doubles": Fault(
        "a large integer becomes its neighbor",
        schemas._require_exact,
        "abs(one) <= _EXACT if isinstance(one, int) else",
        "",
        partial(texts.test_an_impossible_schema_is_refused_with_the_reason, {"const": 2**53 + 1}, "/const 9007199254740993"),
    ),
    "escapes": Fault(
        "a known name is written in another way",
        schemas._Walk.schema,
        "self.open_names |= bool(named) and",
        "self.open_names |= False and",
        texts.test_a_name_cannot_be_written_in_another_way,
    ),
    "silent": Fault(
        "a grammar that cannot go on ends as if it were complete",
        Follower.check,
        "self.matcher.is_error()",
        "False",
        texts.test_a_grammar_that_cannot_go_on_says_so,
    ),
    "lost": Fault(
        "tokens that were lost stay in the grammar",
        Follower.follow,
        "if len(text) < self._end:",
        "if False:",
        texts.test_results_that_are_lost_are_followed_again,
    ),
    "rows": Fault(
        "a row has the mask of another",
        choice._admit,
        "what.mask[rows]",
        "what.mask[: rows.shape[0]]",
        device.test_the_device_takes_nothing_else,
    ),
    "bans": Fault(
        "a ban leaves nothing, and the first token is chosen",
        choice._restrict,
        "jnp.where(stuck[:, None], admitted, adjusted)",
        "adjusted",
        guards.a_grammar_is_stronger_than_bans,
    ),
    "stale": Fault(
        "a mask serves for the token after next",
        Slots.choosing,
        "~self.constrained[rows] | self.masked[rows]",
        "rows >= 0",
        guards.a_mask_serves_for_one_token,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name):
    with applied(FAULTS[name]), pytest.raises((AssertionError, pytest.fail.Exception)):
        FAULTS[name].guard()
    FAULTS[name].guard()
