"""Whole-model programs at the sizes of a run: what the sections on speed, compilation and variants share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.lab import Lab
from ferrum_jax import functional
from ferrum_jax.config import ModelConfig
from ferrum_jax.functional import Sampled, State
from ferrum_jax.sampling import Sampling, SamplingParams

PAGE = 16
KEY = np.zeros(2, np.uint32)


def sampling(lab: Lab, batch: int, **params) -> Sampling:
    """Parameters of `batch` rows that never end; greedy unless said otherwise."""
    one = SamplingParams(**{"temperature": 0.0, "max_tokens": 1 << 20, "ignore_eos": True} | params)
    return lab.put(Sampling.from_params([one] * batch, eos_ids=[], vocab_limit=lab.sizes.config.vocab_size))


def state(lab: Lab, batch: int, position: int) -> State:
    """Rows with `position` tokens in the cache and a random one to continue from; row i is the same in every batch."""
    vocab = lab.sizes.config.vocab_size
    tokens = np.random.default_rng(5).integers(0, vocab, 256)[:batch].astype(np.int32)
    zeros = np.zeros(batch, np.int32)
    return lab.put(State(tokens, zeros + position, zeros, zeros.astype(bool), np.zeros((batch, vocab), np.int32)))


def prompt(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """One prompt int32 [1, prompt] of random tokens, and its length."""
    tokens = np.random.default_rng(6).integers(0, lab.sizes.config.vocab_size, (1, lab.sizes.prompt))
    return tokens.astype(np.int32), np.array([lab.sizes.prompt], np.int32)


class Decoding:
    """A batch with `context` tokens in the cache; each `step` decodes the same `steps` tokens again, in one dispatch."""

    def __init__(self, lab: Lab, params, config: ModelConfig, batch: int, **sampling_params):
        self.lab, self.params, self.config, self.batch = lab, params, config, batch
        self.sampling = sampling(lab, batch, **sampling_params)
        self.state = state(lab, batch, lab.sizes.context)
        self.cache = lab.run(filled_cache, config=config, rows=batch, capacity=lab.sizes.capacity)

    def arguments(self) -> tuple:
        limit = np.int32(self.lab.sizes.steps)
        return self.params, self.cache, self.state, self.sampling, KEY, limit

    def step(self) -> Sampled:
        static: dict[str, Any] = {"config": self.config, "steps": self.lab.sizes.steps}
        self.cache, _, sampled = self.lab.run(functional.advance, *self.arguments(), donate=(1,), **static)
        return sampled

    def content(self) -> dict[str, Any]:
        """Checks the last step's tokens: are they valid, do rows differ, do they change from step to step?"""
        return content(np.asarray(self.step().tokens), self.config.vocab_size)


def content(tokens: np.ndarray, vocab: int) -> dict[str, Any]:
    """The check of sampled tokens int32 [rows, steps]. Random weights may give rows one token in common, not all."""
    rows, steps = tokens.shape
    distinct = len(np.unique(tokens, axis=0))
    valid = bool((tokens >= 0).all() and (tokens < vocab).all())
    values = len(np.unique(tokens))
    return {
        "tokens": int(tokens.size),
        "distinct_rows": distinct,
        "distinct_tokens": values,
        "first": tokens[0, :8].tolist(),
        "ok": valid and distinct >= rows * 3 // 4 and (steps < 8 or values > rows),
    }


# Programs


def filled_cache(*, config: ModelConfig, rows: int, capacity: int):
    """A cache in which every token has random keys and values; those of a row do not depend on `rows`."""
    cache = functional.new_cache(config, num_pages=rows * -(-capacity // PAGE), page_size=PAGE, dtype=config.dtype)
    tokens = cache.num_pages // rows * PAGE

    def values(key):
        return jax.random.normal(key, (tokens, config.num_kv_heads, config.head_dim))

    def fill(i, cache):
        layer, row = i // rows, i % rows
        k, v = (values(jax.random.fold_in(jax.random.fold_in(jax.random.key(2 * row + s), layer), 0)) for s in range(2))
        return cache.write(layer, row * tokens + jnp.arange(tokens, dtype=jnp.int32), k, v)

    return lax.fori_loop(0, config.num_layers * rows, fill, cache)


def empty_cache(*, config: ModelConfig, tokens: int):
    return functional.new_cache(config, num_pages=-(-tokens // PAGE), page_size=PAGE, dtype=config.dtype)
