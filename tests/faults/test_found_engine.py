"""Faults of the engine found with interrupts, damaged snapshots and requests of other engines, each put back."""

import pytest

from ferrum_jax import checks
from ferrum_jax.engine.engine import Engine
from ferrum_jax.engine.ledger import Ledger
from ferrum_jax.engine.pace import Pace
from ferrum_jax.engine.request import Request
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.worker import Worker
from support.patching import Fault, applied
from unit.engine import test_engine_interrupts as interrupts
from unit.engine import test_engine_paging as paging
from unit.engine import test_pace as pace


def all_are_aborted():
    paging.test_an_abort_of_all_that_a_dispatch_has_leaves_no_page_unwritten(False)


FAULTS = {
    "caller": Fault(
        "the caller's thread does the work, where an interrupt cuts it short",
        Worker.call,
        "if _ending.is_set():",
        "if True:",
        interrupts.test_an_interrupt_between_taking_in_and_handing_out_loses_nothing,
    ),
    "undone": Fault(
        "a request whose submission was interrupted stays",
        Worker.call,
        "if undo is not None:",
        "if False:",
        interrupts.test_what_is_interrupted_is_done_or_taken_back,
    ),
    "once": Fault(
        "an output that a reader was about to get is lost",
        Request.__iter__,
        "yield from iter(self._outputs.popleft, None)",
        "yield from [self._outputs.popleft() for _ in range(len(self._outputs))]; raise IndexError",
        interrupts.test_a_loop_that_is_left_loses_no_output,
    ),
    "restore": Fault(
        "a restore that fails keeps its pages",
        Engine._fill_prefix_cache,
        "self._start_over()",
        "pass",
        paging.test_a_restore_that_fails_leaves_no_page_behind,
    ),
    "left behind": Fault(
        "the state of a text that a stop string ends is kept, though the device has gone on",
        Engine._take_row,
        "if full or watcher.at_end_token:",
        "if True:",
        paging.test_a_text_that_the_device_has_left_behind_makes_no_checkpoint,
    ),
    "passed": Fault(
        "a branch goes on from a checkpoint that its origin has given back",
        Ledger._takes_checkpoint,
        "held.checkpoint, held.checkpointed = -1, 0",
        "held.checkpoint = -1",
        paging.test_a_sequence_that_passes_its_checkpoint_while_another_holds_it_has_none,
    ),
    "aborted": Fault(
        "what all rows of a dispatch have left is registered and never written",
        Engine._step,
        "if dispatch is not None:",
        "if dispatch is not None and any(row.valid for row in dispatch.rows):",
        all_are_aborted,
    ),
    "head": Fault(
        "an error that one request brings stops the queue",
        Engine._step,
        "return self._fail({self._scheduler.current.owner: error})",
        "raise",
        paging.test_a_poisoned_request_at_the_head_of_the_queue_ends_alone,
    ),
    "too large": Fault(
        "what never fits waits for ever",
        Scheduler._prompts,
        "if not self.running:",
        "if False:",
        paging.test_a_request_that_can_never_fit_ends_alone,
    ),
    "taken in": Fault(
        "tokens that cannot be taken in stop all others",
        Engine._take_in,
        "errors[row.sequence.owner] = error",
        "raise",
        paging.test_tokens_that_cannot_be_taken_in_end_their_request_alone,
    ),
    "foreign": Fault(
        "a request of another engine is ended in this one's pages",
        Engine._own,
        "if request._engine is not self:",
        "if False:",
        paging.test_a_request_of_another_engine_is_refused,
    ),
    "held up": Fault(
        "one prompt holds up all sequences that decode",
        Scheduler._most,
        "if 0 < first <= _BURST * decoding",
        "if False",
        pace.test_prompts_are_cut_once_most_sequences_decode,
    ),
    "disturbed": Fault(
        "one disturbed measurement decides how prompts are cut",
        Pace.took,
        "_follow(self._token, max(seconds - self._step(decoding), 0.0) / shape.tokens)",
        "seconds",
        pace.test_a_disturbance_is_forgotten_and_a_change_is_learned,
    ),
    "booleans": Fault(
        "True is a token id",
        checks.token_ids,
        "if isinstance(item, bool | np.bool_):",
        "if False:",
        paging.test_booleans_are_no_token_ids,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name):
    with applied(FAULTS[name]), pytest.raises((AssertionError, pytest.fail.Exception)):
        FAULTS[name].guard()
    FAULTS[name].guard()
