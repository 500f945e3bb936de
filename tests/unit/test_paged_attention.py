"""Contract of paged attention, on every backend: numbers against float64, ragged shapes, pages that hold garbage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import Tables, make_plan, paged_attention, write_pages

RNG = np.random.default_rng(3)


def case(queries, contexts, *, heads=(4, 2), head_dim=48, page_size=16, dtype="float32", extra_pages=3):
    """A ragged batch: `queries[s]` new tokens at the end of a sequence of `contexts[s]`; pages in random order."""
    q_heads, kv_heads = heads
    needed = [-(-context // page_size) for context in contexts]
    pool = sum(needed) + extra_pages
    order = RNG.permutation(pool)
    table = np.full((len(contexts), max(needed) + 1), pool - 1, np.int32)
    for s, count in enumerate(needed):
        table[s, :count], order = order[:count], order[count:]
    k, v = (RNG.standard_normal((sum(contexts), kv_heads, head_dim)).astype(np.float32) for _ in "kv")
    stored = jnp.uint16 if dtype == "bfloat16" else dtype
    pages = [
        jnp.full((2, pool, page_size, kv_heads, head_dim), 0x7FC0 if dtype == "bfloat16" else np.nan, stored) for _ in "kv"
    ]
    slots = np.concatenate(
        [table[s][np.arange(c) // page_size] * page_size + np.arange(c) % page_size for s, c in enumerate(contexts)]
    ).astype(np.int32)
    pages = [write_pages(page, 1, slots, jnp.asarray(values)) for page, values in zip(pages, (k, v), strict=True)]
    q = RNG.standard_normal((sum(queries), q_heads, head_dim)).astype(np.float32)
    positions = np.concatenate([np.arange(c - n, c) for n, c in zip(queries, contexts, strict=True)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tables = Tables(positions, starts, np.asarray(contexts, np.int32), table)
    return q, pages, Tables(*map(jnp.asarray, tables)), (k, v)


@functools.partial(jax.jit, static_argnames="window")
def attend(q, pages, tables, window=0):
    plan = make_plan(tables, pages[0], window)
    return paged_attention(q, *pages, 1, plan, q.shape[-1] ** -0.5)


def expected(q, queries, contexts, keys, values, window=0):
    out, token, start = np.zeros(q.shape), 0, 0
    group = q.shape[1] // keys.shape[1]
    for n, context in zip(queries, contexts, strict=True):
        k = np.repeat(keys[start : start + context].astype(np.float64), group, axis=1)
        v = np.repeat(values[start : start + context].astype(np.float64), group, axis=1)
        for position in range(context - n, context):
            low = max(0, position - window + 1) if window else 0
            scores = np.einsum("hd,phd->hp", q[token].astype(np.float64), k[low : position + 1]) * q.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[token] = np.einsum("hp,phd->hd", weights / weights.sum(-1, keepdims=True), v[low : position + 1])
            token += 1
        start += context
    return out


RAGGED = [
    ([1], [1]),
    ([1, 1, 1], [1, 16, 400]),
    ([5], [5]),
    ([150], [150]),
    ([40], [300]),
    ([1, 70, 0, 3, 1], [129, 70, 33, 128, 17]),
    ([1] * 20, list(range(1, 400, 20))),
]


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(("queries", "contexts"), RAGGED, ids=str)
def test_ragged_batches(queries, contexts, window):
    q, pages, tables, (k, v) = case(queries, contexts)
    y = np.asarray(attend(q, pages, tables, window=window))
    assert np.abs(y - expected(q, queries, contexts, k, v, window)).max() <= 2e-6


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 256])
def test_heads_and_page_sizes(heads, page_size):
    queries, contexts = [1, 20], [40, 20]
    q, pages, tables, (k, v) = case(queries, contexts, heads=heads, head_dim=32, page_size=page_size)
    assert np.abs(np.asarray(attend(q, pages, tables)) - expected(q, queries, contexts, k, v)).max() <= 2e-6


@pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_pages(dtype, ulp):
    queries, contexts = [1, 9], [200, 9]
    q, pages, tables, (k, v) = case(queries, contexts, dtype=dtype)
    assert np.abs(np.asarray(attend(q, pages, tables)) - expected(q, queries, contexts, k, v)).max() <= 4 * ulp


def test_rows_of_no_sequence_are_zero():
    queries, contexts = [3, 2], [3, 40]
    q, pages, tables, _ = case(queries, contexts)
    padded = jnp.concatenate([q, jnp.full((4, *q.shape[1:]), jnp.nan)])
    tables = tables._replace(positions=jnp.concatenate([tables.positions, jnp.zeros(4, jnp.int32)]))
    y = np.asarray(attend(padded, pages, tables))
    assert np.isfinite(y).all() and (y[5:] == 0).all()


def test_a_long_context():
    """No ceiling: 30,000 positions."""
    q, pages, tables, (k, v) = case([1], [30_000], heads=(2, 1), head_dim=16)
    assert np.abs(np.asarray(attend(q, pages, tables)) - expected(q, [1], [30_000], k, v)).max() <= 2e-6


def test_temporaries_do_not_grow_with_the_context():
    def temporaries(pages):
        f32, i32 = jnp.float32, jnp.int32
        shapes = [((64, 4, 64), f32), ((1, pages, 16, 2, 64), f32)]
        tables = Tables(*(jax.ShapeDtypeStruct(s, i32) for s in ((64,), (2,), (1,), (1, pages))))
        q, pool = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

        def run(q, pool, tables):
            return paged_attention(q, pool, pool, 0, make_plan(tables, pool), 1.0)

        return jax.jit(run).lower(q, pool, tables).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) <= temporaries(64) + 64 * 2048


def test_slots_of_minus_one_write_nowhere():
    pages = jnp.zeros((1, 2, 4, 1, 2))
    written = write_pages(pages, 0, jnp.asarray([-1, 5, -1]), jnp.ones((3, 1, 2)))
    assert float(written.sum()) == 2.0 and (np.asarray(written)[0, 1, 1] == 1).all()


def test_shapes_that_do_not_fit_are_refused():
    q, pages, tables, _ = case([1], [1])
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :3], pages, tables)
