"""One engine and one server for all tests of this folder: the bundled model, with few and small programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ferrum_jax as fj
from ferrum_jax.server.settings import PLAIN_TEMPLATE
from support.live_server import Live, live


@pytest.fixture(scope="session")
def model() -> fj.Model:
    model = fj.load("tiny", dtype="float32", max_seq_len=256)
    model.tokenizer.chat_template = PLAIN_TEMPLATE
    return model


@pytest.fixture(scope="session")
def engine(model: fj.Model) -> Iterator[fj.Engine]:
    config = fj.EngineConfig(page_size=8, num_pages=128, max_seqs=4, token_budget=16, steps_per_dispatch=2)
    with fj.Engine(model, config) as engine:
        engine.warm_up()
        yield engine


@pytest.fixture(scope="session")
def server(engine: fj.Engine) -> Iterator[Live]:
    with live(engine) as server:
        yield server
