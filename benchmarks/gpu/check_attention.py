"""Checks paged attention, and the step before it, on this device against plain XLA in float32, for every KV dtype.

Both attentions read the same cache, so only the arithmetic is compared: queries and probabilities are rounded to the dtype that
keys and values are multiplied in (16 bits for an 8-bit cache), and products are summed in float32. The two caches that `append`
writes hold float32 values that agree to a few roundings, rounded again to the KV dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.gpu.check_kernels import compare
from benchmarks.gpu.lab import Lab
from pallas_kernels import dispatch
from pallas_kernels.append import append
from pallas_kernels.paged_attention import KV_DTYPES, KVCache, Tables, make_metadata, paged_attention

BOUND = {"float32": 2e-5, "bfloat16": 4 * 2.0**-8, "float16": 4 * 2.0**-11, "int8": 4 * 2.0**-8, "float8_e4m3fn": 4 * 2.0**-8}
PAGE = 16
AHEAD = True  # its programs are compiled in parallel, before the first step


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    lengths = lab.sizes.check_lengths
    decode = [(length, 1) for length in lengths]
    chunks = [(lengths[-1], min(200, lengths[-1] - 1)), (1, 1), (70, 70), (0, 0), (lengths[-2], 1)]
    for dtype in KV_DTYPES:
        for kind, batch, window in (("decode", decode, 0), ("mixed", chunks, 0), ("window", chunks, 33), ("sinks", chunks, 33)):
            if dtype == "bfloat16" or kind == "decode" or (kind == "mixed" and not lab.rehearsal):
                yield f"{kind} {dtype}", functools.partial(check, lab, dtype, kind, batch, window)
        yield f"append {dtype}", functools.partial(check_append, lab, dtype)


def check(lab: Lab, dtype: str, kind: str, batch: list[tuple[int, int]], window: int) -> Iterator[dict]:
    """`batch`: (cached tokens, queries) of each sequence; the pages of a sequence lie in random order."""
    config, rng = lab.sizes.config, np.random.default_rng(11)
    lengths, queries = (np.array(column, np.int32) for column in zip(*batch, strict=True))
    width = max(1, -(-lengths.max() // PAGE))
    table = rng.permutation(len(batch) * width).astype(np.int32).reshape(len(batch), width)
    places = [table[s, np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE for s, n in enumerate(lengths)]
    positions = np.concatenate([np.arange(n - q, n) for n, q in batch]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    used = -(-lengths // PAGE)
    table[np.arange(width) >= used[:, None]] = 2**30  # entries after a sequence's end may be anything
    tables = Tables(positions, starts, lengths, table)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    total = int(lengths.sum())
    k, v = (normal(total, config.num_kv_heads, config.head_dim) for _ in range(2))
    q = normal(len(positions), config.num_heads, config.head_dim)
    sinks = normal(config.num_heads) if kind == "sinks" else None
    arguments = (q, k, v, np.concatenate(places).astype(np.int32), tables, sinks)
    static = {"dtype": dtype, "pages": table.size, "window": window}
    runs = [lab.run(attend, *arguments, **static) for _ in range(2)]
    exact = lab.run(attend_exactly, *arguments, **static)
    if not lab.collecting:
        result = tuple([np.asarray(run)] for run in runs)
        backends = lab.backends(attend, *arguments, **static)
        yield compare(lab, f"attention {kind} {dtype}", result, [np.asarray(exact, np.float64)], BOUND[dtype], backends)


def check_append(lab: Lab, dtype: str) -> Iterator[dict]:
    """Heads normed, rotated and cached: queries and all of the cache, for a token of padding too."""
    config, rng, tokens = lab.sizes.config, np.random.default_rng(12), 37

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q = normal(tokens, config.num_heads, config.head_dim)
    k, v = (normal(tokens, config.num_kv_heads, config.head_dim) for _ in range(2))
    slots = rng.permutation(4 * PAGE)[:tokens].astype(np.int32)
    slots[5] = -1
    angles = normal(tokens, 1, config.rope_dim // 2)
    arguments = (q, k, v, slots, (np.cos(angles), np.sin(angles)), 1 + 0.1 * normal(3, config.head_dim))
    runs = [lab.run(append_to, *arguments, dtype=dtype) for _ in range(2)]
    exact = lab.run(append_exactly, *arguments, dtype=dtype)
    if not lab.collecting:
        result = tuple([np.asarray(part) for part in run] for run in runs)
        wanted = [np.asarray(part, np.float64) for part in exact]
        backends = lab.backends(append_to, *arguments, dtype=dtype)
        yield compare(lab, f"append {dtype}", result, wanted, BOUND[dtype], backends)


# Programs


def attend(q, k, v, slots, tables: Tables, sinks, *, dtype: str, pages: int, window: int) -> jax.Array:
    """Writes k and v into layer 1 of 2 of a new cache and attends to it."""
    cache = KVCache.empty(2, pages, PAGE, k.shape[1], k.shape[2], dtype).write(1, slots, k, v)
    metadata = make_metadata(tables, cache, q.shape[1], window, sinks=sinks is not None)
    return paged_attention(q, cache, 1, metadata, k.shape[2] ** -0.5, sinks)


def attend_exactly(q, k, v, slots, tables: Tables, sinks, *, dtype: str, pages: int, window: int) -> jax.Array:
    with dispatch.on(without_kernels()):
        return attend(q, k, v, slots, tables, sinks, dtype=dtype, pages=pages, window=window)


def append_to(q, k, v, slots, rope, norms, *, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The queries, and what layer 1 of 2 of a new cache holds afterwards."""
    cache = KVCache.empty(2, 4, PAGE, k.shape[1], k.shape[2], dtype)
    q, cache = append(q, k, v, cache, 1, slots, rope, (norms, np.int32(2)), (norms, np.int32(0)))
    return q, cache.read(1, np.arange(4))


def append_exactly(q, k, v, slots, rope, norms, *, dtype: str) -> tuple[jax.Array, jax.Array]:
    with dispatch.on(without_kernels()):
        return append_to(q, k, v, slots, rope, norms, dtype=dtype)


def without_kernels() -> dispatch.Target:
    """The traced target, presented as a GPU too old for the kernels, so that everything is plain XLA."""
    return dispatch.Target("gpu", "7.5") if dispatch.target().platform == "gpu" else dispatch.target()


COMPILED_ONCE = (attend_exactly, append_exactly)  # plain XLA: one KV dtype is enough for a rehearsal
