"""Faults of servers, each put into our own source: its guard must fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ferrum_jax.server import answers, bodies, conversation, gate, page, service, store
from support.patching import Fault, applied, in_folder
from unit.server import test_answers as guards
from unit.server import test_store as stores


def nothing_is_ignored_silently() -> None:
    body = bodies.SamplingBody.model_validate_json('{"one": 1, "stream": true, "stream_options": {"two": 2}}')
    assert body.ignored() == ["one", "stream_options.two"]


def what_is_not_supported_is_refused() -> None:
    body = bodies.SamplingBody.model_validate_json('{"best_of": 3}')
    with pytest.raises(bodies.ApiError):
        body.require_supported()


def an_answer_does_not_go_on_after_its_end() -> None:
    model = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=9, eos_ids=frozenset({7})))
    with pytest.raises(ValueError, match="the token 7 ends an answer"):
        conversation.begun(SimpleNamespace(engine=SimpleNamespace(model=model)), [3, 7])


def a_browser_gets_the_page_without_a_key() -> None:
    assert {"/", "/web/app.js", "/web/vendor/purify.js"} <= page.paths.__wrapped__()


def a_loop_that_has_failed_is_not_healthy() -> None:
    engine = SimpleNamespace(failure="no room", serving=True)
    assert service.Service.health(SimpleNamespace(draining=False, engine=engine)) == "no room"  # type: ignore[arg-type]


FAULTS = {
    "health": Fault(
        "a server whose loop has failed says that it is well",
        service.Service.health,
        "return self.engine.failure or",
        "return",
        a_loop_that_has_failed_is_not_healthy,
    ),
    "kept": Fault(
        "an answer that is kept is not in the file yet",
        store.Store._put,
        "with self._table:",
        "if True:",
        in_folder(stores.test_what_is_kept_is_in_the_file),
    ),
    "overwritten": Fault(
        "a file that is something else becomes a store",
        store._open,
        'if file.read(16) not in (b"", b"SQLite format 3\\0"):',
        "if False:",
        in_folder(stores.test_other_files_are_refused_and_left_alone),
    ),
    "wakings": Fault(
        "every output of every request wakes the event loop",
        answers.Bridge.call,
        "if not self._woken:",
        "if True:",
        guards.test_many_notes_wake_the_loop_once,
    ),
    "asleep": Fault(
        "notes after the first are never delivered",
        answers.Bridge._run,
        "self._woken = False",
        "pass",
        guards.test_many_notes_wake_the_loop_once,
    ),
    "leaves": Fault(
        "a request goes on after its client has left",
        answers.Answers._watch,
        "self.end(ClientGone())",
        "pass",
        guards.test_a_client_that_leaves_ends_all_that_is_open,
    ),
    "cancelled": Fault(
        "a stream that always has something to send cannot be cancelled",
        answers.Answers.batches,
        "await asyncio.sleep(0)",
        "pass",
        guards.test_a_reader_that_never_waits_notices_that_it_is_cancelled,
    ),
    "twice": Fault(
        "an end that is told twice is sent twice",
        answers.Answers.batches,
        "for index in ready if index in self._unsent",
        "for index in ready",
        guards.test_what_arrives_together_comes_together_and_ends_once,
    ),
    "keys": Fault(
        "only one key is known",
        gate.Gate._knows,
        "return any(found)",
        "return found[-1]",
        guards.test_only_a_key_is_a_key,
    ),
    "beginning": Fault(
        "an answer goes on after a token that ends it",
        conversation.begun,
        "if id in tokenizer.eos_ids:",
        "if False:",
        an_answer_does_not_go_on_after_its_end,
    ),
    "page": Fault(
        "the files of the page need a key that the page cannot send",
        page.paths,
        '{"/", *(f"/web/{name}" for name in _files())}',
        '{"/"}',
        a_browser_gets_the_page_without_a_key,
    ),
    "unsupported": Fault(
        "a field that is not supported is ignored",
        bodies.Body.require_supported,
        "if name in self.NEUTRAL and value",
        "if False and value",
        what_is_not_supported_is_refused,
    ),
    "unknown": Fault(
        "a field inside another one is ignored without a word",
        bodies.Body.ignored,
        'names + [f"{field}.{name}" for field, part in self._parts() for name in part.ignored()]',
        "names",
        nothing_is_ignored_silently,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name: str) -> None:
    with applied(FAULTS[name]), pytest.raises((AssertionError, pytest.fail.Exception)):
        FAULTS[name].guard()
    FAULTS[name].guard()
