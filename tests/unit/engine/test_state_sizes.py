"""The memory of every kind of state, and how it is shared among them."""

import dataclasses
from types import SimpleNamespace

import jax

from ferrum_jax import memory, state
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.engine import EngineConfig, executor
from ferrum_jax.engine.ledger import pool_sizes
from support.random_models import DENSE
from support.recurrent_toy import Toy


def unlike() -> ModelConfig:
    """A layer that sees all, two with a window of 8, and one that recurs."""
    layer = DENSE.layers[0]
    windowed = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=8))
    return dataclasses.replace(DENSE, layers=(layer, windowed, windowed, dataclasses.replace(layer, mixer=Toy(5))))


def test_every_kind_of_state_is_counted():
    config, engine = unlike(), EngineConfig(page_size=16, max_seqs=2, token_budget=16, checkpoints=3)
    token = DENSE.num_kv_heads * DENSE.head_dim * 2 * 4  # of one layer in float32
    assert state.bytes_per_token(config, "float32") == 3 * token and config.bytes_per_state == 4 * (5 + 2 * 5)
    sizes = pool_sizes([kind.window for kind in state.page_kinds(config)], 100, engine)
    assert sizes == [100, 2 * (2 + 2)]  # 8 + 16 tokens in two pages, and two at the borders
    whole = memory.abstract_state(config, sizes, 16, "float32", Placement.of(), engine.num_states)
    assert memory.nbytes(whole) == 16 * token * (100 + 2 * 8) + (2 + 3) * config.bytes_per_state


def test_pages_are_chosen_for_all_pools_together(monkeypatch):
    config, engine = unlike(), EngineConfig(max_seqs=2, token_budget=16)
    model = SimpleNamespace(config=config, kv_dtype="float32", max_seq_len=4096, placement=Placement.of(jax.devices("cpu")[0]))
    room = 1 << 22
    monkeypatch.setattr(executor, "_HOST_CACHE_BYTES", room)
    pages = executor.choose_num_pages(model, engine)

    def needed(pages: int) -> int:
        sizes = pool_sizes([kind.window for kind in state.page_kinds(config)], pages, engine)
        return memory.nbytes(memory.abstract_state(config, sizes, 16, "float32", Placement.of(), engine.num_states))

    assert 64 < pages < 2 * 256 and needed(pages) <= room < needed(pages + 1)
