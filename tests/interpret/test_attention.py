"""The attention kernels, interpreted, against the definition in float64 (see attention_cases).

In every case, pages that no sequence has hold NaN, and unused entries of the page tables are not numbers of pages.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import KV_DTYPES, make_metadata, mosaic_tpu, triton, xla
from support.attention_cases import HALF_ULPS, LAYER, case, expected

GPU, TPU = dispatch.Target("gpu", "9.0"), dispatch.Target("tpu", "v5e")


@functools.partial(jax.jit, static_argnames="window")
def on_gpu(q, cache, tables, sinks=None, window=0):
    with dispatch.on(GPU):
        metadata = make_metadata(tables, cache, q.shape[1], window, sinks=sinks is not None)
    assert metadata.backend is triton
    return triton.attention(q, cache, LAYER, metadata, q.shape[-1] ** -0.5, sinks, interpret=True)


def check_gpu(queries, contexts, window=0, dtype="bfloat16", sinks=None, **options):
    q, cache, tables, k, v = case(queries, contexts, dtype=dtype, target=GPU, **options)
    y, bound = expected(q, queries, contexts, k, v, window, HALF_ULPS[dtype], sinks)
    sinks = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    error = np.abs(np.asarray(on_gpu(q, cache, tables, sinks, window=window)) - y)
    assert (error <= bound).all(), (error / np.maximum(bound, 1e-30)).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 90])
def test_mixed_batches(dtype, window):
    check_gpu([1, 70, 0, 3, 1, 1], [300, 70, 33, 270, 17, 1], window, dtype, padding=2)


@pytest.mark.parametrize("window", [0, 90])
def test_sinks(window):
    """Of one range, of several that a second kernel merges, and of many tokens; heads that are no power of two."""
    sinks = np.asarray([20.0, 0.5, -2.0, -90.0, 1.0, 3.0])
    check_gpu([1, 20, 1], [300, 20, 17], window, "int8", sinks, heads=(6, 2), padding=2)
    check_gpu([1, 1], [30, 9], window, sinks=sinks, heads=(6, 2))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16, 24, 256])
def test_lengths_about_a_page(page_size):
    lengths = [1, max(1, page_size - 1), page_size, page_size + 1]
    check_gpu([1] * 4, lengths, page_size=page_size)
    check_gpu(lengths, lengths, page_size=page_size)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim"), [((14, 2), 64), ((9, 3), 80), ((4, 4), 256), ((16, 1), 6)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_heads(heads, head_dim, dtype):
    check_gpu([1, 9], [70, 40], dtype=dtype, heads=heads, head_dim=head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed):
    rng = np.random.default_rng(seed)
    queries = rng.choice([0, 1, 1, 2, 30], 6)
    contexts = queries + rng.integers(queries == 0, 280)
    dtype, window = rng.choice(KV_DTYPES), int(rng.choice([0, 33]))
    check_gpu(queries.tolist(), contexts.tolist(), window, str(dtype), padding=int(rng.integers(5)), seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 5000])
def test_a_long_context(window):
    """There is no limit: 30,000 positions, 118 ranges."""
    check_gpu([1], [30_000], window, heads=(2, 1), head_dim=16)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch():
    """Bit for bit: alone, with others, under a longer page table; and a prompt at once or in two chunks."""
    q, cache, tables, _, _ = case([1, 1, 1], [290, 40, 600], dtype="bfloat16", target=GPU)
    together = np.asarray(on_gpu(q, cache, tables))
    for s, length in enumerate((290, 40, 600)):
        alone = tables._replace(
            positions=tables.positions[s : s + 1],
            query_starts=jnp.array([0, 1]),
            kv_lengths=tables.kv_lengths[s : s + 1],
            page_table=tables.page_table[s : s + 1, : -(-length // 16)],
        )
        assert (np.asarray(on_gpu(q[s : s + 1], cache, alone)) == together[s : s + 1]).all()

    q, cache, tables, _, _ = case([120], [400], dtype="bfloat16", target=GPU)
    whole, parts = np.asarray(on_gpu(q, cache, tables)), []
    for start, end in ((0, 48), (48, 120)):
        chunk = tables._replace(
            positions=tables.positions[start:end], query_starts=jnp.array([0, end - start]), kv_lengths=jnp.array([280 + end])
        )
        parts.append(np.asarray(on_gpu(q[start:end], cache, chunk)))
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.slow
def test_scales_of_any_size():
    """Queries that are too large for float16, and some that would vanish in it."""
    for dtype in ("float16", "int8", "float8_e4m3fn"):
        q, cache, tables, k, v = case([1, 5], [40, 20], dtype=dtype, target=GPU)
        for size in (1e-6, 1e6):
            y, bound = expected(q * size, [1, 5], [40, 20], k, v, 0, HALF_ULPS[dtype])
            assert (np.abs(np.asarray(on_gpu(q * size, cache, tables)) - y) <= bound).all(), (dtype, size)


@pytest.mark.slow
def test_nan_that_is_seen_is_passed_on():
    """Also where it is bits of an 8-bit float."""
    for dtype in KV_DTYPES:
        q, cache, tables, _, _ = case([1, 1], [40, 40], dtype=dtype, target=GPU)
        nan = jnp.full((1, 2, 48), jnp.nan)
        slot = tables.page_table[0, 1:2] * 16 + 3
        for k, v in ((nan, 0 * nan + 1), (jnp.ones_like(nan), nan)):
            y = np.asarray(on_gpu(q, cache.write(LAYER, slot, k, v), tables))
            assert np.isnan(y[0]).any() and np.isfinite(y[1]).all(), dtype


@pytest.fixture
def library_kernel(monkeypatch):
    """jax's TPU kernel with the plain interpreter, which does not support masked stores to a part of a ref; the one that
    detects races does not support reshaped refs."""

    def store(ref, values, *, mask):
        ref[...] = jnp.where(mask, values, ref[...])

    monkeypatch.setattr(pltpu, "store", store)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("window", [0, 90])
def test_tpu(library_kernel, dtype, window):
    """Sequences without queries and without cached tokens, padding, and more than one block of keys and values."""
    queries, contexts = [1, 70, 0, 3, 1], [600, 70, 33, 130, 17]
    q, cache, tables, k, v = case(queries, contexts, dtype=dtype, head_dim=128, page_size=128, padding=2, target=TPU)
    with dispatch.on(TPU):
        metadata = make_metadata(tables, cache, 4, window)
    assert metadata.backend is mosaic_tpu
    y, bound = expected(q, queries, contexts, k, v, window, HALF_ULPS["float32" if dtype == "float32" else "bfloat16"])
    bound += np.abs(y) * (0 if dtype == "float32" else 2.0**-8)  # the result is rounded as well
    assert (np.abs(np.asarray(mosaic_tpu.attention(q, cache, LAYER, metadata, 128**-0.5)) - y) <= bound).all()


@pytest.mark.slow
def test_tpu_sequences_that_are_not_there(library_kernel):
    """A row whose sequence has nothing cached is zero, and the other rows do not change."""
    q, cache, tables, k, v = case([1, 1, 1], [40, 30, 20], head_dim=128, page_size=128, target=TPU)
    tables = tables._replace(kv_lengths=tables.kv_lengths.at[1].set(0))
    with dispatch.on(TPU):
        metadata = make_metadata(tables, cache, 4)
    y = np.asarray(mosaic_tpu.attention(q, cache, LAYER, metadata, 128**-0.5))
    of_others, bound = expected(q, [1, 1, 1], [40, 30, 20], k, v)
    assert (y[1] == 0).all() and (np.abs(y - of_others) <= bound)[[0, 2]].all()
    reference = xla.attention(q, cache, LAYER, plan_of_xla(tables, cache), 128**-0.5)
    assert (np.asarray(reference)[1] == 0).all()
    assert (np.asarray(on_gpu(q, cache, tables))[1] == 0).all()


def plan_of_xla(tables, cache):
    with dispatch.on(dispatch.Target("cpu")):
        return make_metadata(tables, cache, 4)
