"""Pages and scheduling by hand: who holds what, what is found again, and who comes first. No test here takes a fixture or
computes anything: tests/faults calls them too."""

import asyncio
import contextlib
import dataclasses
import hashlib
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.engine import EngineConfig
from ferrum_jax.engine.ledger import Held, Ledger, pool_sizes
from ferrum_jax.engine.pages import PagePool, entry
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Sequence
from ferrum_jax.prompts import Prompts
from support.engine_stand_in import Model, check, drive, expected, step, use

GREEDY = fj.SamplingParams(max_tokens=6, ignore_eos=True, seed=0)


def ledger_of(num_pages, page_size=2, salt=b"", windows=(0,)):
    return Ledger(EngineConfig(page_size=page_size), windows, [num_pages] * len(windows), 100, salt)


def filled(ledger, tokens, adapter=-1):
    """Pages full of `tokens`, held once, and their digests."""
    (pool,), pages, digests = ledger.pools, [], [ledger.root(adapter)]
    for start in range(0, len(tokens), ledger.page_size):
        known = entry(digests[-1], tokens[start : start + ledger.page_size])
        pages.append(pool.take())
        digests.append(known.digest)
        pool.register(pages[-1], known)
    return pages, digests[1:]


def found(ledger, tokens, adapter=-1):
    """The pages that are found, and their digests."""
    (pages,), digests, *_ = ledger.find(tokens, adapter)
    return pages, digests


def returned(pool, pages):
    for page in reversed(pages):
        pool.give_back(page)


def engine_of(context=60, windows=(0,), recurs=False, **config):
    return use(
        Model(context, *windows, recurs=recurs),
        EngineConfig(**{"page_size": 4, "num_pages": 12, "steps_per_dispatch": 1, **config}),
    )


def answers(engine, *requests):
    """Drives an engine until the requests are finished, and requires that each gives what it would give alone."""
    drive(engine)
    for request in requests:
        place = engine.model.adapter_index(request.adapter)
        right = expected(request.prompt_token_ids, request.params, request._seed, engine.model.max_seq_len, place)
        assert (request.token_ids, request.text, request.finish_reason) == (right.token_ids, right.text, right.finish_reason)
        outputs = list(request)
        assert [id for output in outputs for id in output.token_ids] == right.token_ids
        assert "".join(output.text for output in outputs) == right.text
    metrics = engine.metrics()
    assert metrics["pages_free"] + metrics["pages_cached"] == engine.num_pages


# ---- the pool


def test_a_page_is_found_by_its_text_and_all_that_is_before_it():
    ledger = ledger_of(8)
    pages, digests = filled(ledger, [1, 2, 3, 4, 5, 6])
    assert found(ledger, [1, 2, 3, 4, 5, 6, 7]) == (pages, digests)
    assert found(ledger, [1, 2, 3, 4, 9, 9, 9])[0] == pages[:2]
    assert found(ledger, [3, 4, 5, 6, 7])[0] == []  # the same text at another place is another text
    assert found(ledger, [1, 2, 5, 6, 7])[0] == pages[:1]
    assert found(ledger, [9, 1, 2, 3, 4])[0] == []
    assert len(set(digests)) == 3 and ledger.pools[0].find(entry(digests[1], [5, 6])) == pages[2]


def test_the_last_token_is_never_found():
    ledger = ledger_of(4)
    pages, _ = filled(ledger, [1, 2, 3, 4])
    assert found(ledger, [1]) == found(ledger, [1, 2]) == ([], [])
    assert found(ledger, [1, 2, 3])[0] == found(ledger, [1, 2, 3, 4])[0] == pages[:1]
    assert found(ledger, [1, 2, 3, 4, 5])[0] == pages


def test_other_models_and_adapters_have_other_texts():
    one, other = ledger_of(4, salt=b"one"), ledger_of(4, salt=b"other")
    assert filled(one, [1, 2])[1] != filled(other, [1, 2])[1]
    assert one.pools[0].find(entry(other.root(), [1, 2])) is None
    with_adapter = filled(one, [1, 2], 0)
    assert found(one, [1, 2, 3]) != found(one, [1, 2, 3], 0) == with_adapter
    assert found(one, [1, 2, 3], 1) == ([], [])


def test_engines_of_other_models_have_other_texts():
    one, other, same = Model(), Model(), Model()
    other.fingerprint = lambda: "another"
    roots = [use(model, EngineConfig(num_pages=4))._scheduler.ledger.root() for model in (one, other, same)]
    assert roots[0] != roots[1] and roots[0] == roots[2]
    wider = use(one, EngineConfig(num_pages=4, page_size=8))
    assert wider._scheduler.ledger.root() != roots[0]


def test_a_digest_that_collides_is_no_hit():
    class Same:
        """A hash that gives the same digest for everything."""

        def __init__(self, *_, **__):
            pass

        def digest(self):
            return b"the same"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashlib, "blake2b", Same)
        pool = PagePool(4)
        first, second = pool.take(), pool.take()
        pool.register(first, entry(b"root", [1, 2]))
        pool.register(second, entry(b"root", [3, 4]))  # the first one serves
        assert pool.find(entry(b"root", [1, 2])) == first and entry(b"root", [1, 2]).digest == b"the same"
        assert pool.find(entry(b"root", [3, 4])) is None and pool.find(entry(b"elsewhere", [1, 2])) is None
        returned(pool, [first, second])
        assert (pool.free, pool.cached) == (3, 1)


def test_the_text_unused_for_longest_goes_first_and_its_end_before_its_beginning():
    ledger = ledger_of(6)
    (pool,), (old, _), (new, _) = ledger.pools, filled(ledger, [1, 2, 3, 4]), filled(ledger, [5, 6, 7, 8])
    returned(pool, old)
    returned(pool, new)
    for page in found(ledger, [1, 2, 9])[0]:  # used again: now it is the newest
        pool.share(page)
        pool.give_back(page)
    assert (pool.free, pool.cached, pool.available, pool.evictions) == (2, 4, 6, 0)
    assert {pool.take(), pool.take()}.isdisjoint(old + new)  # free ones first
    assert [pool.take() for _ in range(4)] == [old[1], new[1], new[0], old[0]]
    assert (pool.available, pool.evictions) == (0, 4)
    assert found(ledger, [1, 2, 9]) == found(ledger, [5, 6, 9]) == ([], [])


def test_a_page_of_several_holders_is_returned_by_the_last():
    ledger = ledger_of(2)
    (pool,), ((page,), _) = ledger.pools, filled(ledger, [1, 2])
    pool.share(page)
    assert pool.holders(page) == 2
    pool.give_back(page)
    assert (pool.holders(page), pool.free, pool.cached) == (1, 1, 0)
    pool.give_back(page)
    assert (pool.holders(page), pool.free, pool.cached) == (0, 1, 1)


def test_a_page_that_nobody_holds_cannot_be_given_back():
    ledger = ledger_of(2)
    (pool,) = ledger.pools
    page = pool.take()
    pool.give_back(page)
    with pytest.raises(RuntimeError, match=f"page {page} was given back more often"):
        pool.give_back(page)
    ((page,), _) = filled(ledger, [1, 2])
    pool.give_back(page)
    with pytest.raises(RuntimeError, match="more often"):
        pool.give_back(page)
    assert (pool.free, pool.cached) == (1, 1)


def test_a_reset_forgets_texts_and_leaves_pages_to_their_holders():
    ledger = ledger_of(4)
    (pool,), (held, _), (cached, _) = ledger.pools, filled(ledger, [1, 2]), filled(ledger, [3, 4])
    returned(pool, cached)
    ledger.forget()
    assert (pool.free, pool.cached, pool.holders(held[0])) == (3, 0, 1)
    assert found(ledger, [1, 2, 9]) == found(ledger, [3, 4, 9]) == ([], [])
    pool.register(held[0], entry(ledger.root(), [1, 2]))  # it may be registered once more
    assert found(ledger, [1, 2, 9])[0] == held
    returned(pool, held)
    assert (pool.free, pool.cached) == (3, 1)


# ---- the scheduler


def scheduler_of(num_pages=12, page_size=4, context=48, windows=(0,), **config):
    config = EngineConfig(page_size=page_size, num_pages=num_pages, **config)
    ledger = Ledger(config, windows, pool_sizes(windows, num_pages, config), context)
    return Scheduler(config, ledger)


def added(scheduler, number, length, more=10):
    sequence = Sequence(number, list(range(1, length + 1)), length, length + more)
    scheduler.add(sequence)
    return sequence


def run(scheduler, steps=1):
    """One dispatch and its results: token 7 wherever one is chosen."""
    dispatch = scheduler.next(steps)
    for row in dispatch.rows:
        scheduler.received(row, [7] * dispatch.most if row.samples else [], dispatch)
    return dispatch


def shape(dispatch):
    return [(row.sequence.number, row.start, row.length, row.samples) for row in dispatch.rows]


def test_decodes_come_first_and_prompts_fill_the_budget():
    scheduler = scheduler_of(token_budget=6, max_seqs=3, prefix_cache=False)
    first = added(scheduler, 0, 4)
    assert shape(run(scheduler)) == [(0, 0, 4, True)]
    added(scheduler, 1, 9)
    added(scheduler, 2, 3)
    assert shape(run(scheduler)) == [(0, -1, 1, True), (1, 0, 5, False)]
    assert shape(run(scheduler)) == [(0, -1, 1, True), (1, 5, 4, True), (2, 0, 1, False)]
    assert shape(run(scheduler)) == [(0, -1, 1, True), (1, -1, 1, True), (2, 1, 2, True)]
    assert first.tokens == [1, 2, 3, 4, 7, 7, 7, 7]


def test_a_prompt_gets_on_beside_any_number_of_decodes():
    scheduler = scheduler_of(token_budget=1, max_seqs=3)
    added(scheduler, 0, 1)
    run(scheduler)
    added(scheduler, 1, 2)
    assert shape(run(scheduler)) == [(0, -1, 1, True), (1, 0, 1, False)]
    assert shape(run(scheduler)) == [(0, -1, 1, True), (1, 1, 1, True)]


def test_pages_are_taken_as_a_sequence_grows():
    scheduler = scheduler_of()
    sequence = added(scheduler, 0, 3, more=40)
    held = []
    for _ in range(10):
        run(scheduler)
        held.append(sequence.held.count)
    assert held == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_the_youngest_is_preempted_and_waits_in_its_old_place():
    scheduler = scheduler_of(num_pages=4, page_size=2, token_budget=16)
    old, young = added(scheduler, 0, 3), added(scheduler, 1, 1)
    run(scheduler)
    later = added(scheduler, 2, 4)
    epoch = young.epoch
    while young.state == "running":
        run(scheduler)
    assert (old.state, young.state, young.slot, young.held.count, young.pending) == ("running", "waiting", -1, 0, 0)
    assert scheduler.waiting == [young, later] and young.epoch > epoch and scheduler.preemptions == 1
    assert young.tokens[0] == 1 and young.tokens[1:] == [7] * (len(young.tokens) - 1)  # what it said stays said


def test_admission_leaves_a_page_for_those_that_run():
    scheduler = scheduler_of(num_pages=3)
    added(scheduler, 0, 4)
    run(scheduler)  # one page held
    second = added(scheduler, 1, 8)
    run(scheduler)
    assert second.state == "waiting"  # two pages for its prompt would leave none
    scheduler = scheduler_of(num_pages=3)
    alone = added(scheduler, 0, 12)
    run(scheduler)
    assert alone.state == "running" and scheduler.ledger.available == 0  # alone it may have all


def test_a_sequence_is_ended_once():
    scheduler = scheduler_of()
    waiting, running = added(scheduler, 1, 5), added(scheduler, 0, 5)
    scheduler.finish(waiting)
    run(scheduler)
    for _ in range(3):
        scheduler.finish(running)
        scheduler.finish(waiting)
    assert scheduler.ledger.available == 12 and not scheduler.waiting and not scheduler.running
    assert len(scheduler._slots) == scheduler.config.max_seqs


def test_results_of_an_earlier_life_are_not_wanted():
    scheduler = scheduler_of()
    sequence = added(scheduler, 0, 5)
    (row,) = scheduler.next(1).rows
    assert row.valid
    scheduler.preempt(sequence)
    assert not row.valid
    (again,) = scheduler.next(1).rows
    assert again.valid and not row.valid
    scheduler.finish(sequence)
    assert not again.valid


def test_several_steps_are_made_while_nobody_waits():
    scheduler = scheduler_of(max_seqs=1)
    added(scheduler, 0, 4, more=6)
    assert run(scheduler, 4).steps == 0
    assert run(scheduler, 4).steps == 4
    added(scheduler, 1, 4)
    assert run(scheduler, 4).steps == 1
    assert scheduler.running[0].tokens == [1, 2, 3, 4] + [7] * 6


def test_pages_behind_the_window_are_given_back():
    scheduler = scheduler_of(windows=[5], prefix_cache=False)
    sequence = added(scheduler, 0, 3, more=30)
    for _ in range(25):
        run(scheduler)
        assert sum(page >= 0 for page in sequence.held.pages[0]) <= 3
        seen = range(max(0, sequence.written + 1 - 5), sequence.written)
        assert all(sequence.held.pages[0][position // 4] >= 0 for position in seen)
    assert scheduler.ledger.available >= 9


def test_a_pool_with_a_window_gives_pages_back_while_another_holds_its_own():
    scheduler = scheduler_of(windows=[0, 5], prefix_cache=False, max_seqs=2, token_budget=4)
    full, windowed = scheduler.ledger.pools
    assert (full.num_pages, windowed.num_pages) == (12, 2 * 5)  # 5 + 4 tokens in 3 pages, and two at the borders
    sequence = added(scheduler, 0, 3, more=40)
    for _ in range(40):
        run(scheduler)
        assert full.free == 12 - sequence.held.count and -1 not in sequence.held.pages[0]
        assert windowed.free == 10 - sum(page >= 0 for page in sequence.held.pages[1]) >= 7
        seen = range(max(0, sequence.written + 1 - 5), sequence.written)
        assert all(sequence.held.pages[1][position // 4] >= 0 for position in seen)
    assert sequence.held.count >= 10


def test_a_text_is_found_where_each_pool_has_what_it_looks_at():
    ledger = ledger_of(8, windows=(0, 3))
    full, windowed = ledger.pools
    held = Held(2, 8)
    text = list(range(1, 13))
    assert ledger.grow(held, 12)
    ledger.settle(held, text, 12, -1)
    assert held.pages[1][:5] == [-1] * 5 and held.pages[1][5] >= 0  # position 12 sees 10 and 11
    assert [len(pages) for pages in ledger.find([*text, 1]).pages] == [6, 6]
    found = ledger.find([*text[:7], 9])
    assert found.pages == [held.pages[0][:3], [-1, -1, found.pages[1][2]]] and found.full == 3 and found.pages[1][2] >= 0
    ledger.give_back(held)
    gone = windowed.find(entry(found.digests[1], text[4:6]))
    while windowed.find(entry(found.digests[1], text[4:6])) is not None:
        windowed.take()
    assert gone == found.pages[1][2] and full.cached == 6
    assert ledger.find([*text[:7], 9]).full == 0  # position 6 sees 4 and 5
    assert ledger.find([*text, 1]).full == 6  # position 12 does not


# ---- both under the engine


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
    """A prompt makes one before its last page, and one where it leaves a text that is known; there others go on."""
    engine = engine_of(recurs=True, num_pages=20)
    known, saved = [1, 2, 3, 4, 5, 1, 2, 3], []
    for prompt in ([*known, 4], [*known, 5], [1, 2, 3, 4, 2, 2, 2], [1, 2, 3, 4, 3, 3, 3], [*known, 1]):
        answers(engine, engine.submit(prompt, GREEDY))
        saved.append(engine.metrics()["prefix_saved_tokens"] - sum(saved))
    assert saved == [0, 8, 0, 4, 8]  # of the first page alone there was no state before the third prompt
    metrics = engine.metrics()
    assert metrics["checkpoints_cached"] == 2 and metrics["checkpoints_free"] == 30 and not metrics["checkpoint_evictions"]


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


def test_the_table_has_a_place_for_every_token_of_the_context():
    scheduler = scheduler_of(context=9, page_size=4)
    sequence = added(scheduler, 0, 8, more=1)
    run(scheduler)
    assert sequence.held.table.shape == (1, 3) and sequence.held.table.dtype == np.int32


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
        engine._device.fault = place
        drive(engine)
        assert [request.finish_reason == "error" for request in (first, second)] == failed
        answers(engine, engine.submit([3, 3], GREEDY), *([] if failed[1] else [second]))


@pytest.mark.parametrize("recurs", [False, True])
def test_an_abort_of_all_that_a_dispatch_has_leaves_no_page_unwritten(recurs):
    """What it would have written is registered already."""
    engine = engine_of(recurs=recurs, token_budget=8)
    for steps in (0, 1):
        gone = engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], GREEDY)
        for _ in range(steps):
            step(engine)
        engine._device.between = lambda gone=gone: engine._end_choices(gone)  # as the desk does it, with the lock held
        step(engine)
        check(engine)
        answers(engine, engine.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 2], GREEDY))
        assert gone.finish_reason == "abort"


def test_an_abort_while_a_dispatch_is_started_harms_nobody():
    """Another thread may come in between the scheduler's decision and the launch."""
    engine = engine_of(max_seqs=2, num_pages=16)
    other = engine.submit([5, 4, 3], fj.SamplingParams(max_tokens=20, ignore_eos=True, seed=2))
    step(engine)
    for prompt in ([1, 2, 3, 4, 5, 1], [2, 2, 2, 2, 2, 2, 2, 2, 2]):
        gone = engine.submit(prompt, GREEDY)
        engine._device.between = lambda gone=gone: engine.abort(gone)
        step(engine)
        step(engine)
        engine.metrics()  # the abort, which the driving thread could only hand over, is done before
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


# ---- what is wrong with one request


def beside(engine, spoil):
    """Three requests, of which `spoil` changes the first before anything runs: the others must not notice."""
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
    fetch, reset = engine._device.fetch, engine._device.reset

    def fails(*_):
        raise KeyboardInterrupt

    engine._device.fetch = engine._device.reset = fails
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine._device.fetch, engine._device.reset = fetch, reset
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
        write = other._device.write
        other._device.write = None
        with pytest.raises(TypeError):
            other.restore(path)
        check(other)
        other._device.write = write
        copy = other.restore(path)
        check(other)
        answers(other, running)
        answers(engine, origin)
        assert copy.result() == origin.result() and other.metrics()["prefix_hit_pages"] == 2
