"""Snapshots that are damaged or from another engine: each is refused by name and leaves nothing in the engine."""

import dataclasses

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.engine import snapshot
from ferrum_jax.state import DecodeState
from support.engine_stand_in import check, step
from support.ledgers import GREEDY, engine_of


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", [], "prompt is empty"),
        ("prompt", [1, 6], "prompt must be a list of token ids below 6"),
        ("prompt", [1, True], "prompt must be"),
        ("prompt", "12", "prompt must be"),
        ("output", [-1], "output must be"),
        ("output", [1, 2**40], "output must be"),
        ("output", [1] * 6, "output has 6 tokens where max_tokens is 6"),
        ("output", [0, 1], "goes on after its end"),
        ("prompt", [1, 2], "full pages of 4 tokens where the text has"),
        ("seed", -1, "seed must be"),
        ("seed", 1.5, "seed must be"),
        ("adapter", 7, "damaged"),
        ("params", {"temperature": -1.0}, "temperature"),
        ("params", {"unknown": 1}, "unknown"),
        ("params", {"n": "x"}, r"SamplingParams\.n must be"),
        ("params", None, "damaged"),
        ("params", {"logit_bias": [[77, 1.0]]}, "token id 77 is out of range"),
        ("finish_reason", "done", "finish_reason must be"),
        ("logprobs", [], "logprobs do not go with"),
        ("params", {"logprobs": 1, "max_tokens": 6}, "logprobs do not go with"),
        ("prompt_logprobs", [None], "prompt_logprobs do not go with"),
    ],
)
def test_a_damaged_snapshot_is_refused_and_named(tmp_path, field, value, message):
    engine = engine_of()
    engine.model.adapters = ("one", "other")
    params = dataclasses.replace(GREEDY, ignore_eos=False, max_tokens=6, logit_bias=None)
    request = engine.submit([1, 2, 3, 4, 5, 1, 2], params)
    step(engine)
    step(engine)
    facts, content = engine._driver.call(lambda: engine._read(request))
    assert content.num_pages == 1
    snapshot.save(tmp_path / "sound", engine.identity, facts, content)
    engine.restore(tmp_path / "sound")
    snapshot.save(tmp_path / "damaged", engine.identity, {**facts, field: value}, content)
    before = engine.metrics()
    with pytest.raises(fj.ModelFileError, match=f"damaged.*{message}"):
        engine.restore(tmp_path / "damaged")
    assert {**engine.metrics(), **dict.fromkeys(engine._seconds, 0)} == {**before, **dict.fromkeys(engine._seconds, 0)}


@pytest.mark.parametrize("change", ["layers", "heads", "dtype", "many", "scales"])
def test_pages_that_are_not_those_of_the_engine_are_refused(tmp_path, change):
    engine = engine_of()
    request = engine.submit([1, 2, 3, 4, 5, 1, 2], GREEDY)
    step(engine)
    facts, content = engine._driver.call(lambda: engine._read(request))
    (pool,) = content.pools
    pages = pool.pages
    if change == "scales":
        pool = dataclasses.replace(pool, scales=np.zeros((1, 1, 8), np.float32))
    changed = {"layers": pages[[0, 0]], "heads": pages[..., :2, :], "dtype": pages.astype(np.float32), "many": pages[:, [0, 0]]}
    content = DecodeState((dataclasses.replace(pool, pages=changed.get(change, pages)),))
    snapshot.save(tmp_path / "one", engine.identity, facts, content)
    with pytest.raises(fj.ModelFileError, match=r"damaged snapshot: .*(pages|scales)"):
        engine.restore(tmp_path / "one")
    check(engine)


def test_a_snapshot_that_is_longer_than_this_engine_allows(tmp_path):
    engine, short = engine_of(), engine_of(context=8)
    request = engine.submit([1, 2, 3, 4, 5, 1, 2], GREEDY)
    engine.step()
    engine.snapshot(request, tmp_path / "one")
    with pytest.raises(ValueError, match="leaves no room in a context of 7"):
        engine_of(context=7).restore(tmp_path / "one")
    assert short.restore(tmp_path / "one").result().finish_reason == "length"
    while len(request.token_ids) < 2:
        engine.step()
    engine.snapshot(request, tmp_path / "two")
    with pytest.raises(ValueError, match="9 tokens leave no room in a context of 8"):
        short.restore(tmp_path / "two")
