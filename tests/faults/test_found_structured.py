"""Faults of structured output, each put into our own source: its guard must fail."""

from __future__ import annotations

from functools import partial

import pytest

from ferrum_jax import choice
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.slots import Slots, mask
from ferrum_jax.structured import schemas
from ferrum_jax.structured.grammar import Follower
from support import guards
from support.patching import Fault, applied
from unit.engine import test_engine_schedules as schedules
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
        "if end < self._end:",
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
    "uncounted": Fault(
        "what a grammar forces is not in the penalties",
        mask,
        "jnp.where(there, forced, slots.seen.shape[1])",
        "slots.seen.shape[1]",
        guards.what_a_grammar_forces_counts_like_what_is_chosen,
    ),
    "cut": Fault(
        "what a grammar forces is cut into other tokens than one after the other",
        Follower.forced,
        "found.append(tokens[0])",
        "found += tokens",
        texts.test_forced_tokens_are_those_of_one_after_the_other,
    ),
    "taken": Fault(
        "pages of a row that has ended just now are taken while it writes to them",
        Scheduler.force,
        "row.valid and",
        "",
        schedules.test_forced_tokens_take_no_page_of_a_row_that_has_just_ended,
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
