"""Pages in the engine: found, shared, given back and never lost, whatever happens to the requests that hold them."""

import asyncio
import contextlib
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.prompts import Prompts
from support.engine_stand_in import Model, check, drive, expected, step
from support.ledgers import GREEDY, answers, engine_of


@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_a_prompt_around_one_page_is_the_same_the_second_time(length):
    engine = engine_of()
    for _ in range(3):
        answers(engine, engine.submit([1, 2, 3, 4, 5][:length], GREEDY))
    found = engine.metrics()
    saved = 4 * 2 if length > 4 else 0  # a prompt of exactly one page shares nothing: its last token is computed again
    assert found["prefix_saved_tokens"] == saved and found["prompt_tokens"] == 3 * length - saved


def test_an_exact_page_that_is_cached_is_computed_in_a_page_of_its_own():
    engine = engine_of()
    answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4], GREEDY))
    both = [engine.submit([1, 2, 3, 4, 5, 1, 2, 3], GREEDY) for _ in range(2)]
    answers(engine, *both)
    assert engine.metrics()["prefix_saved_tokens"] == 8  # the first page of each; the second one holds the last token


def test_every_chunk_of_a_prompt_is_known_by_all_that_is_before_it():
    engine = engine_of(token_budget=4)
    answers(engine, engine.submit([1, 2, 3, 4, 5, 5, 5, 5, 1], GREEDY))
    answers(engine, engine.submit([5, 5, 5, 5, 2, 2], GREEDY))  # the second chunk's text, at the beginning
    assert engine.metrics()["prefix_hit_pages"] == 0
    answers(engine, engine.submit([1, 2, 3, 4, 5, 5, 5, 5, 2], GREEDY))
    assert engine.metrics()["prefix_hit_pages"] == 2


def test_texts_are_kept_while_nothing_runs():
    engine = engine_of()
    answers(engine, engine.submit([1, 2, 3, 4, 5], GREEDY))
    for _ in range(3):
        assert not step(engine)
    answers(engine, engine.submit([1, 2, 3, 4, 5], GREEDY))
    assert engine.metrics()["prefix_hit_pages"] == 1
    engine.reset()
    answers(engine, engine.submit([1, 2, 3, 4, 5], GREEDY))
    assert engine.metrics()["prefix_hit_pages"] == 1


def test_generated_pages_are_found_too():
    engine = engine_of()
    first = engine.submit([1, 2, 3], fj.SamplingParams(max_tokens=10, ignore_eos=True, seed=0))
    answers(engine, first)
    answers(engine, engine.submit([1, 2, 3, *first.token_ids, 4], GREEDY))
    assert engine.metrics()["prefix_hit_pages"] == 3  # 12 tokens were computed, the last one was only chosen


def test_requests_beside_others_look_texts_up_and_leave_theirs():
    engine = engine_of(token_budget=3)
    first = engine.submit([5, 5], fj.SamplingParams(max_tokens=24, ignore_eos=True, seed=0))
    step(engine)
    second = engine.submit([1, 2, 3, 4, 5, 1], GREEDY)
    while second.state != "finished":
        step(engine)
    third = engine.submit([1, 2, 3, 4, 5, 2], GREEDY)
    while third.state == "waiting":
        step(engine)
    assert first.state == "running" and engine.metrics()["prefix_hit_pages"] == 1
    answers(engine, first, second, third)


def test_a_branch_writes_into_a_page_of_its_own():
    engine = engine_of()
    origin = engine.submit([1, 2, 3, 4, 5], fj.SamplingParams(max_tokens=9, ignore_eos=True, seed=0))
    while len(origin.token_ids) < 2:
        step(engine)
    branch = origin.fork(fj.SamplingParams(max_tokens=9, ignore_eos=True, seed=1))
    step(engine)
    (ours,), (theirs,) = origin._sequence.held.pages, branch._sequence.held.pages
    assert ours[0] == theirs[0] and ours[1] != theirs[1]
    answers(engine, origin, branch)
    assert engine.metrics()["prompt_tokens"] == 5 + 1 and branch.token_ids != origin.token_ids[2:]


def test_choices_share_the_pages_of_their_prompt():
    engine = engine_of()
    request = engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4], fj.SamplingParams(max_tokens=5, n=3, ignore_eos=True, seed=3))
    answers(engine, *request.choices)
    assert engine.metrics()["prompt_tokens"] == 9 + 2 and len({tuple(c.token_ids) for c in request.choices}) == 3


def test_preempted_requests_go_on_where_they_were():
    engine = engine_of(num_pages=4, max_seqs=3, prefix_cache=False)
    params = fj.SamplingParams(max_tokens=11, ignore_eos=True, seed=1, stop="dd")
    requests = [engine.submit([1 + i, 2, 3, 4, 5][: 3 + i % 2], params) for i in range(3)]
    answers(engine, *requests)
    assert engine.metrics()["preemptions"] > 0


def test_a_pool_that_runs_out_lets_requests_wait():
    engine = engine_of(num_pages=3, max_seqs=4, prefix_cache=False)
    answers(engine, *[engine.submit([1, 2, i], fj.SamplingParams(max_tokens=9, seed=i)) for i in range(1, 6)])


def test_what_can_never_fit_is_refused_with_the_numbers():
    engine = engine_of(num_pages=3)
    answers(engine, engine.submit([1, 2, 3], fj.SamplingParams(max_tokens=10, ignore_eos=True, seed=0)))  # the last is not kept
    with pytest.raises(ValueError, match="a prompt of 3 tokens with max_tokens=11 needs 4 pages of 4 tokens; the engine has 3"):
        engine.submit([1, 2, 3], fj.SamplingParams(max_tokens=11, ignore_eos=True))
    assert engine.metrics()["requests_waiting"] == 0


@pytest.mark.parametrize("prompts", [(10, 13), (13, 13)])
def test_a_hit_longer_than_the_window_leaves_room_to_go_on(prompts):
    engine = engine_of(windows=[4], page_size=1, num_pages=10, max_seqs=1, token_budget=1)
    for length in prompts:
        answers(engine, engine.submit([1] * length, fj.SamplingParams(max_tokens=2, ignore_eos=True, seed=0)))


def test_layers_that_recur_go_on_from_a_checkpoint():
    """A prompt makes one before its last page, and one where it diverges from a known text; other requests continue there."""
    engine = engine_of(recurs=True, num_pages=20)
    known, saved = [1, 2, 3, 4, 5, 1, 2, 3], []
    for prompt in ([*known, 4], [*known, 5], [1, 2, 3, 4, 2, 2, 2], [1, 2, 3, 4, 3, 3, 3], [*known, 1]):
        answers(engine, engine.submit(prompt, GREEDY))
        saved.append(engine.metrics()["prefix_saved_tokens"] - sum(saved))
    assert saved == [0, 8, 0, 4, 8]  # of the first page alone there was no state before the third prompt
    metrics = engine.metrics()
    assert metrics["checkpoints_cached"] == 7 and metrics["checkpoints_free"] == 25 and not metrics["state_evictions"]
    assert metrics["state_checkpoints"] == 7 and metrics["state_hits"] == 3


def test_a_long_prompt_leaves_states_on_its_way_as_the_budget_allows():
    """Eight states more than the two of ends let two texts of 64 tokens have one every 16 tokens."""
    sizes = {"max_seqs": 2, "token_budget": 8, "num_pages": 40}
    for checkpoints, saved in ((2, 0), (10, 32), (18, 40)):
        engine = engine_of(64, recurs=True, checkpoints=checkpoints, **sizes)
        text = [1 + i * i % 5 for i in range(50)]
        answers(engine, engine.submit(text, GREEDY))
        answers(engine, engine.submit([*text[:43], *([1] * 7)], GREEDY))
        metrics = engine.metrics()
        assert metrics["prefix_saved_tokens"] == saved and metrics["state_hits"] == bool(saved)
    model = SimpleNamespace(bytes_per_state=100)
    config = fj.EngineConfig(checkpoint_bytes=1099, max_seqs=2, token_budget=8, page_size=4).of_model(model)
    assert config.checkpoints == 10 and config.stride(64) == 4 and config.stride(30) == 2
    with pytest.raises(ValueError, match="checkpoint_bytes is given in place of checkpoints"):
        fj.EngineConfig(checkpoints=3, checkpoint_bytes=100)


def test_a_checkpoint_is_evicted_together_with_its_page():
    """A state without the pages before it is of no use, and takes no place."""
    engine = engine_of(recurs=True, num_pages=5)
    answers(engine, engine.submit([1, 2, 3, 4, 5], GREEDY))
    assert engine.metrics()["checkpoints_cached"] == 2
    answers(engine, engine.submit([5, 4, 3, 2, 1] * 3, GREEDY))
    metrics = engine.metrics()
    assert metrics["checkpoints_cached"] == 2 and metrics["state_evictions"] == 2 and metrics["state_checkpoints"] == 4


@pytest.mark.parametrize(("budget", "launches"), [(20, 6), (9, 7), (8, 7), (4, 9)])
def test_a_checkpoint_costs_no_dispatch(budget, launches):
    """Of 13 tokens; the checkpoint is after 12. Then five more tokens are decoded, one a dispatch."""
    counts = []
    for recurs in (False, True):
        engine = engine_of(recurs=recurs, token_budget=budget)
        answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3], GREEDY))
        counts.append(engine._executor.launches)
        answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 4], GREEDY))
        assert engine.metrics()["prefix_saved_tokens"] == 12
    assert counts == [launches, launches]


@pytest.mark.parametrize("windows", [[0], [3], [0, 3]])
@pytest.mark.parametrize(("steps", "drafts"), [(1, 0), (4, 0), (4, 2)])
def test_a_conversation_goes_on_from_the_end_of_an_answer(windows, steps, drafts):
    """Wherever in a page that is, and again after the next answer; the newest token of a text is never in its state."""
    for length in range(1, 6):
        engine = engine_of(recurs=True, windows=windows, num_pages=20, steps_per_dispatch=steps, speculation=drafts)
        text, saved = list(range(1, length + 1)), 0
        for turn in range(3):
            request = engine.submit(text, GREEDY)
            answers(engine, request)
            metrics = engine.metrics()
            assert metrics["prefix_saved_tokens"] - saved == (len(text) - 3 if turn else 0)
            saved = metrics["prefix_saved_tokens"]
            text += [*request.token_ids, 1, 2]


@pytest.mark.parametrize("stop", [(), ("a", "d")])
def test_later_turns_compute_only_what_is_new(stop):
    """Four conversations of ten turns that take turns, each with a beginning of 60 tokens. After a stop string also the answer
    is computed again, from the last page of its prompt on."""
    sizes = {"max_seqs": 8, "token_budget": 16, "steps_per_dispatch": 4, "checkpoints": 16 if stop else 8}
    engine = engine_of(255, recurs=True, num_pages=200, **sizes)
    texts = [[1 + (i * i + which) % 5 for i in range(60)] for which in range(4)]
    known, question = [0] * 4, [1, 2, 3]
    for turn in range(10):
        for which, text in enumerate(texts):
            before = engine.metrics()["prompt_tokens"]
            request = engine.submit(text, fj.SamplingParams(max_tokens=8, ignore_eos=True, seed=turn, stop=stop))
            answers(engine, request)
            again = 0 if not turn else engine.config.page_size + 8 if stop else 1
            assert engine.metrics()["prompt_tokens"] - before <= len(text) - known[which] + again
            text += request.token_ids
            known[which] = len(text)
            text += question


def test_the_end_of_an_answer_is_kept_after_a_conversation_has_left_its_place():
    """There is one place, with the end of `first`: `second` goes on from there in a dispatch that is chosen before `other` has
    ended and started after that, while its program is compiled."""
    for launches in range(3):
        engine = engine_of(recurs=True, checkpoints=1, num_pages=40)
        short, brief = (fj.SamplingParams(max_tokens=count, ignore_eos=True, seed=0) for count in (1, 3))
        for _ in range(launches):
            answers(engine, engine.submit([4, 4], short))
        first = engine.submit([1, 2, 3], brief)
        answers(engine, first)
        other = engine.submit([5, 4], short)
        step(engine)
        second = engine.submit([1, 2, 3, *first.token_ids, 1], GREEDY)
        answers(engine, other, second)
        assert engine.metrics()["prefix_saved_tokens"] == 5


def test_a_text_that_the_device_has_left_behind_makes_no_checkpoint():
    """A stop string ends it here, and the next step of the device is on its way."""
    params = fj.SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    whole = expected([1, 2, 3], params, 0, 60).text
    for length in range(2, 9):
        engine = engine_of(recurs=True)
        request = engine.submit([1, 2, 3], dataclasses.replace(params, stop=whole[:length]))
        answers(engine, request)
        assert request.finish_reason == "stop" and not engine.metrics()["checkpoints_cached"]
        answers(engine, engine.submit([1, 2, 3, *request.token_ids, 1], GREEDY))
        assert not engine.metrics()["prefix_saved_tokens"]


def test_a_checkpoint_without_a_place_is_none():
    """There is one place: for the end of a text, which takes that of its prompt."""
    for prompt, saved in (([1, 2, 3], 8), ([1, 2, 3, 4, 5], 10)):
        engine = engine_of(recurs=True, checkpoints=1, num_pages=20)
        for text in ([5, *prompt], prompt):
            request = engine.submit(text, GREEDY)
            answers(engine, request)
            assert engine.metrics()["checkpoints_cached"] == 1 and not engine.metrics()["prefix_saved_tokens"]
        answers(engine, engine.submit([*prompt, *request.token_ids, 3], GREEDY))
        assert engine.metrics()["prefix_saved_tokens"] == saved
    engine = engine_of(recurs=True, checkpoints=0)
    answers(engine, engine.submit([1, 2, 3], GREEDY))
    assert engine.metrics()["checkpoints_free"] == engine.metrics()["checkpoints_cached"] == 0


def test_a_sequence_that_passes_its_checkpoint_while_another_holds_it_has_none():
    """And there is no place for a new one: a branch of it goes on from what is found."""
    engine, text = engine_of(recurs=True, checkpoints=1, num_pages=40), [1, 2, 3, 4, 5, 1, 2, 3]
    params = fj.SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    first = engine.submit([*text, 4], params)
    while not first.token_ids:
        step(engine)
    second = engine.submit([*text, *text, 5], params)
    while len(second.token_ids) < 2:
        step(engine)
    answers(engine, first, second, second.fork(dataclasses.replace(params, seed=1)))
    assert engine.metrics()["prefix_saved_tokens"] == 16


def test_a_branch_and_a_copy_of_what_recurs():
    with tempfile.TemporaryDirectory() as folder:
        engine, other = engine_of(recurs=True), engine_of(recurs=True)
        params = fj.SamplingParams(max_tokens=12, ignore_eos=True, seed=0)
        origin = engine.submit([1, 2, 3, 4, 5, 1], params)
        while len(origin.token_ids) < 2:
            step(engine)
        branch = origin.fork(dataclasses.replace(params, seed=1))
        engine.snapshot(origin, Path(folder) / "one")
        answers(engine, origin, branch)
        assert engine.metrics()["prefix_saved_tokens"] == 4  # from the checkpoint on
        copy = other.restore(Path(folder) / "one")
        check(other)
        drive(other)
        assert copy.result() == origin.result() and other.metrics()["prefix_saved_tokens"] == 4


def test_metrics_count_every_pool():
    engine = engine_of(windows=[0, 3], max_seqs=1, token_budget=4)
    answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4], GREEDY))
    metrics = engine.metrics()
    assert engine.num_pages == 12 + 4 and metrics["pages_cached_full"] == 3 and metrics["pages_free_full"] == 9
    assert metrics["pages_free"] == metrics["pages_free_full"] + metrics["pages_free_window_3"]
    assert metrics["pages_cached"] == metrics["pages_cached_full"] + metrics["pages_cached_window_3"]
    assert "pages_free_full" not in engine_of().metrics()


@pytest.mark.parametrize("windows", [[3], [0, 3], [3, 0, 9]])
def test_a_snapshot_has_what_each_pool_looks_at(windows):
    with tempfile.TemporaryDirectory() as folder:
        for steps in (2, 12):
            path = Path(folder) / str(steps)
            engine, other = engine_of(windows=windows), engine_of(windows=windows)
            origin = engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4], fj.SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
            for _ in range(steps):
                step(engine)
            engine.snapshot(origin, path)
            copy = other.restore(path)
            check(other)
            drive(other)
            answers(engine, origin)
            assert copy.result() == origin.result() and other.metrics()["prefix_hit_pages"] >= 2


@pytest.mark.parametrize(("steps", "drafts"), [(1, 0), (4, 0), (4, 2), (1, 4), (4, 4)])
def test_a_window_in_the_fewest_pages(steps, drafts):
    sizes = {"page_size": 1, "max_seqs": 1, "token_budget": 1, "steps_per_dispatch": steps, "speculation": drafts}
    (needed,) = engine_of(windows=[3], **sizes)._scheduler.ledger.pages_needed(50)
    engine = engine_of(windows=[3], **{**sizes, "num_pages": needed})
    answers(engine, engine.submit([1, 2, 3, 4], fj.SamplingParams(max_tokens=40, ignore_eos=True, seed=0)))


def test_sixty_forgotten_requests_leave_the_pool_whole():
    engine = engine_of(max_seqs=2)
    for i in range(60):
        request = engine.submit([1, 2, 3, 4, 1 + i % 5], GREEDY)
        for _ in range(i % 4):
            step(engine)
        engine.abort(request)
        check(engine)
    drive(engine)
    found = engine.metrics()
    assert found["pages_free"] + found["pages_cached"] == engine.num_pages and not found["requests_running"]


def test_a_stop_string_of_several_tokens_is_never_shown():
    engine = engine_of()
    plain = expected([1, 2], fj.SamplingParams(max_tokens=12, ignore_eos=True, seed=5), 5, 60).text
    for start in range(1, 6):
        stop = plain[start : start + 3]
        request = engine.submit([1, 2], fj.SamplingParams(max_tokens=12, ignore_eos=True, seed=5, stop=stop))
        answers(engine, request)
        assert request.finish_reason == "stop" and request.text == plain[: plain.index(stop)]


def test_drafts_stay_in_the_pages_of_their_row_while_others_wait():
    engine = engine_of(page_size=1, max_seqs=1, speculation=2)
    params = fj.SamplingParams(max_tokens=8, ignore_eos=True, seed=0)
    answers(engine, *[engine.submit([1, 2 + i], params) for i in range(2)])


def test_the_context_ends_a_row_among_longer_ones():
    engine = engine_of(context=17, steps_per_dispatch=4, max_seqs=2)
    params = fj.SamplingParams(max_tokens=14, ignore_eos=True, seed=0)
    requests = [engine.submit([1] * 14, params), engine.submit([2], params)]
    answers(engine, *requests)
    assert [len(request.token_ids) for request in requests] == [3, 14]


def test_a_failure_ends_the_requests_of_its_step_alone():
    for place, failed in (("launch", [True, True]), ("fetch", [True, False])):
        engine = engine_of()
        first = engine.submit([1, 2, 3, 4], GREEDY)
        step(engine)
        second = engine.submit([2, 2, 3, 4], GREEDY)
        engine._executor.fault = place
        drive(engine)
        assert [request.finish_reason == "error" for request in (first, second)] == failed
        answers(engine, engine.submit([3, 3], GREEDY), *([] if failed[1] else [second]))


@pytest.mark.parametrize("recurs", [False, True])
def test_an_abort_of_all_that_a_dispatch_has_leaves_no_page_unwritten(recurs):
    """The pages it would have written are already registered."""
    engine = engine_of(recurs=recurs, token_budget=8)
    for steps in (0, 1):
        gone = engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], GREEDY)
        for _ in range(steps):
            step(engine)
        engine._executor.between = lambda gone=gone: engine._end_choices(gone)  # as the desk does it, with the lock held
        step(engine)
        check(engine)
        answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 2], GREEDY))
        assert gone.finish_reason == "abort"


def test_an_abort_while_a_dispatch_is_started_harms_nobody():
    """Another thread may act between the scheduler's decision and the launch."""
    engine = engine_of(max_seqs=2, num_pages=16)
    other = engine.submit([5, 4, 3], fj.SamplingParams(max_tokens=20, ignore_eos=True, seed=2))
    step(engine)
    for prompt in ([1, 2, 3, 4, 5, 1], [2, 2, 2, 2, 2, 2, 2, 2, 2]):
        gone = engine.submit(prompt, GREEDY)
        engine._executor.between = lambda gone=gone: engine.abort(gone)
        step(engine)
        step(engine)
        engine.metrics()  # waits for the abort, which the driving thread could only hand over
        assert gone.finish_reason == "abort" and other.state == "running"
    again = [engine.submit([1, 2, 3, 4, 5, 2], GREEDY), engine.submit([2] * 10, GREEDY)]
    answers(engine, other, *again)


def test_a_reader_whose_event_loop_is_closed_harms_nobody():
    engine = engine_of()
    request = engine.submit([1, 2, 3], GREEDY)

    async def read():
        async for _ in request:
            pass

    async def read_for_a_moment():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(), 0.01)

    engine.serving = True  # so that the reader waits to be woken
    asyncio.run(read_for_a_moment())
    engine.serving = False
    answers(engine, request)


# ---- faults of a single request


def beside(engine, spoil):
    """Three requests; `spoil` changes the first before anything runs. The others must not be affected."""
    first, *others = [engine.submit([1, 2, 3, 4, i], GREEDY) for i in range(3)]
    spoil(first)
    answers(engine, *others)
    check(engine)
    return first


def test_a_poisoned_request_at_the_head_of_the_queue_ends_alone():
    def spoil(request):
        request._sequence.tokens[1] = 2**40  # no int32

    first = beside(engine_of(), spoil)
    assert first.finish_reason == "error" and "OverflowError" in first.error


def test_a_request_that_can_never_fit_ends_alone():
    def spoil(request):
        request._sequence.tokens += [1] * 100

    first = beside(engine_of(context=200), spoil)
    assert first.finish_reason == "error" and "105 tokens do not fit into 12 pages" in first.error


def test_tokens_that_cannot_be_taken_in_end_their_request_alone():
    def spoil(request):
        request._watcher._decoder = None

    first = beside(engine_of(), spoil)
    assert first.finish_reason == "error" and "AttributeError" in first.error


def test_booleans_are_no_token_ids():
    model = SimpleNamespace(max_seq_len=9, config=Model().config)
    assert Prompts.checked(model, [[1, np.int64(2)]]) == [[1, 2]]
    for ids in ([1, True], [False], np.asarray([True])):
        with pytest.raises(ValueError, match="token ids must be integers"):
            Prompts.checked(model, [ids])


def test_a_recovery_that_fails_is_made_again():
    engine = engine_of()
    requests = [engine.submit([1, 2, 3, 4, i], GREEDY) for i in range(3)]
    step(engine)
    fetch, reset = engine._executor.fetch, engine._executor.reset

    def fails(*_):
        raise KeyboardInterrupt

    engine._executor.fetch = engine._executor.reset = fails
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine._executor.fetch, engine._executor.reset = fetch, reset
    answers(engine, *requests)
    check(engine)


def test_a_request_of_another_engine_is_refused():
    ours, theirs = engine_of(), engine_of()
    request = theirs.submit([1, 2], GREEDY)
    for use_it in (ours.abort, lambda request: ours.snapshot(request, "nowhere")):
        with pytest.raises(ValueError, match="of another engine"):
            use_it(request)
        with pytest.raises(ValueError, match="expected a Request"):
            use_it(None)
    answers(theirs, request)


def test_a_restore_that_fails_leaves_no_page_behind():
    with tempfile.TemporaryDirectory() as folder:
        engine, path = engine_of(), Path(folder) / "snapshot"
        origin = engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4], GREEDY)
        step(engine)
        step(engine)
        engine.snapshot(origin, path)
        other = engine_of()
        running = other.submit([5, 5, 5, 5, 5], GREEDY)
        step(other)
        write = other._executor.write
        other._executor.write = None
        with pytest.raises(TypeError):
            other.restore(path)
        check(other)
        other._executor.write = write
        copy = other.restore(path)
        check(other)
        answers(other, running)
        answers(engine, origin)
        assert copy.result() == origin.result() and other.metrics()["prefix_hit_pages"] == 2
