"""Pages and scheduling by hand: which sequence holds which page, what is found again, and which comes first. These tests take
no fixtures and compute nothing on a device, because tests/faults also calls them."""

import hashlib

import numpy as np
import pytest

from ferrum_jax.engine import EngineConfig
from ferrum_jax.engine.ledger import Held, Ledger, pool_sizes
from ferrum_jax.engine.pages import PagePool, entry
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Sequence
from support.engine_stand_in import Model, use
from support.ledgers import filled, found, ledger_of, returned

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
    """One dispatch and its results: every chosen token is 7."""
    dispatch = scheduler.next(steps)
    for row in dispatch.rows:
        scheduler.received(row, [7] * dispatch.most(row) if row.samples else [], dispatch)
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
    assert young.tokens[0] == 1 and young.tokens[1:] == [7] * (len(young.tokens) - 1)  # its output is kept


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


def test_the_table_has_a_place_for_every_token_of_the_context():
    scheduler = scheduler_of(context=9, page_size=4)
    sequence = added(scheduler, 0, 8, more=1)
    run(scheduler)
    assert sequence.held.table.shape == (1, 3) and sequence.held.table.dtype == np.int32
