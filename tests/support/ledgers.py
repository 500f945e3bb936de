"""Ledgers and engines of the stand-in, for tests of who holds which page."""

import ferrum_jax as fj
from ferrum_jax.engine import EngineConfig
from ferrum_jax.engine.ledger import Ledger
from ferrum_jax.engine.pages import entry
from support.engine_stand_in import Model, drive, expected, use

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
    """Drives an engine until the requests are finished, and requires of each the output that it has alone."""
    drive(engine)
    for request in requests:
        index = engine.model.adapter_index(request.adapter)
        right = expected(request.prompt_token_ids, request.params, request._seed, engine.model.max_seq_len, index)
        assert (request.token_ids, request.text, request.finish_reason) == (right.token_ids, right.text, right.finish_reason)
        outputs = list(request)
        assert [id for output in outputs for id in output.token_ids] == right.token_ids
        assert "".join(output.text for output in outputs) == right.text
    metrics = engine.metrics()
    assert metrics["pages_free"] + metrics["pages_cached"] == engine.num_pages
