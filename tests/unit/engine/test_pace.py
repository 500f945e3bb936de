"""How long a prompt may hold up those that decode: what follows from measured times, and what the scheduler makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.ledger import Ledger
from ferrum_jax.engine.pace import Pace
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Sequence

CONFIG = EngineConfig(num_pages=1000, prefix_cache=False)  # 512 tokens of 32 rows


def measured(pace: Pace, tokens: int, rows: int, seconds: float, steps: int = 0) -> None:
    """A dispatch of `rows` rows; in one with prompts, one of them decodes."""
    found = [SimpleNamespace(start=-1), *[SimpleNamespace(start=0)] * (rows - 1)]
    pace.took(SimpleNamespace(tokens=tokens, rows=found, steps=steps), seconds)  # type: ignore[arg-type]


def pace_of(token: float, *steps: tuple[int, float], config: EngineConfig = CONFIG) -> Pace:
    """Measured: `token` seconds for each token of a mixed step, and decode steps of some rows."""
    pace = Pace(config)
    for rows, seconds in steps:
        measured(pace, 0, rows, 3 * seconds, 3)
    measured(pace, config.token_budget, 2, min(seconds for _, seconds in steps) + config.longest * token)
    return pace


@pytest.mark.parametrize(
    ("token", "decoding", "steps", "tokens"),
    [
        (0.00035, 16, 1, 128),  # 20 + 45 ms, where a decode step takes 20
        (0.00035, 16, 2, 256),  # 20 + 90 ms, where a dispatch takes 40
        (0.0004, 1, 1, 64),  # a smaller shape would make the prompt wait too long
        (0.0001, 16, 1, 256),
        (0.00009, 16, 1, 512),
        (0.01, 31, 2, 64),
    ],
)
def test_a_step_takes_a_few_dispatches(token: float, decoding: int, steps: int, tokens: int) -> None:
    assert pace_of(token, (1, 0.01), (16, 0.02)).most(decoding, steps) == tokens


def test_what_is_not_known_does_not_limit() -> None:
    pace = Pace(CONFIG)
    measured(pace, 500, 32, 9.0)
    assert pace.most(1, 1) == 512
    measured(pace, 0, 16, 0.02, 1)
    assert pace.most(16, 1) == 512 and pace.most(1, 1) == 512
    small = pace_of(1.0, (1, 0.01), config=EngineConfig(max_seqs=4, token_budget=16, num_pages=9))
    assert small.most(1, 1) == 16  # there is no other shape
    wide = pace_of(1.0, (1, 0.01), config=EngineConfig(max_seqs=200, token_budget=32, num_pages=9))
    assert wide.most(150, 1) == 32  # the scheduler adds the one token for which there is always room


def test_a_disturbance_is_forgotten_and_a_change_is_learned() -> None:
    pace = pace_of(0.00035, (16, 0.02))
    for _ in range(2):
        measured(pace, 500, 32, 60.0)
        measured(pace, 0, 16, 60.0, 1)
    assert pace.most(16, 1) == 128
    for _ in range(100):
        measured(pace, 500, 32, 2.0)
    assert pace.most(16, 1) == 64


def test_prompts_are_cut_once_most_sequences_decode() -> None:
    scheduler = Scheduler(CONFIG, Ledger(CONFIG, [0], [1000], 600))
    scheduler.pace = pace_of(0.0004, (1, 0.01))
    for number in range(4):
        scheduler.add(Sequence(number, [1] * 300, 300, 400))
    chunks = []
    while scheduler.waiting or any(sequence.prefilled < 300 for sequence in scheduler.running):
        dispatch = scheduler.next(1)
        assert dispatch is not None and dispatch.steps == 0
        chunks.append(dispatch.tokens)
        for row in dispatch.rows:
            scheduler.received(row, [7] if row.samples else [], dispatch)
    # First one decodes where three wait; then three decode, and 61 tokens of the last prompt fit into each step.
    assert chunks[:2] == [512, 512] and set(chunks[2:-1]) == {64} and sum(chunks) > 1200
