"""Contract of paged attention in plain XLA: numbers against float64, ragged shapes, pages that hold garbage; the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kv_table
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import KV_DTYPES, KVCache, Tables, bytes_per_token, make_metadata, paged_attention
from support.attention_cases import LAYER, case, expected, rounded


@functools.partial(jax.jit, static_argnames=("window", "value_dim"))
def attend(q, cache, tables, sinks=None, window=0, value_dim=None):
    metadata = make_metadata(tables, cache, q.shape[1], window, sinks=sinks is not None, value_dim=value_dim)
    return paged_attention(q, cache, LAYER, metadata, q.shape[-1] ** -0.5, sinks)


def check(queries, contexts, window=0, sinks=None, **options):
    q, cache, tables, k, v = case(queries, contexts, **options)
    y, bound = expected(q, queries, contexts, k, v, window, sinks=sinks)
    sinks, value_dim = None if sinks is None else jnp.asarray(sinks, jnp.float32), options.get("value_dim")
    assert (np.abs(np.asarray(attend(q, cache, tables, sinks, window=window, value_dim=value_dim)) - y) <= bound).all()


SINKS = np.asarray([30.0, 0.5, -2.0, -90.0])
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
    check(queries, contexts, window)


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(("queries", "contexts"), [([1], [1]), ([1, 70, 0, 3, 1], [129, 70, 33, 128, 17])], ids=str)
def test_sinks(queries, contexts, window):
    """Far above the scores, among them and far below; also where a row has to itself a product that is padded."""
    check(queries, contexts, window, sinks=SINKS)
    check(queries, contexts, window, heads=(1, 1), sinks=SINKS[1:2])


def test_sinks_change_no_row_of_no_sequence_and_have_a_derivative():
    q, cache, tables, k, v = case([3, 2], [3, 40], padding=4)
    sinks = jnp.asarray(SINKS[::-1], jnp.float32)
    y = np.asarray(attend(q, cache, tables, sinks))
    assert np.isfinite(y).all() and (y[5:] == 0).all()

    def dense(sinks):
        scores = jnp.einsum("hd,phd->hp", q[4], jnp.repeat(k[3:], 2, axis=1)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks[:, None]], axis=1), axis=1)[:, :-1]
        return jnp.einsum("hp,phd->hd", weights, jnp.repeat(v[3:], 2, axis=1)).sum()

    found = jax.grad(lambda sinks: attend(q, cache, tables, sinks)[4].sum())(sinks)
    assert np.allclose(found, jax.grad(dense)(sinks), atol=1e-5) and np.abs(found).max() > 1e-3


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 256])
def test_heads_and_page_sizes(heads, page_size):
    check([1, 20], [40, 20], heads=heads, head_dim=32, page_size=page_size)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_every_dtype_is_read_exactly(dtype):
    """Only the contents of the cache are rounded, not the arithmetic."""
    check([1, 9], [200, 9], dtype=dtype)
    check([1, 9], [200, 9], dtype=dtype, heads=(4, 1), value_dim=32)


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(("queries", "contexts"), [([1], [1]), ([1, 70, 0, 3, 1], [129, 70, 33, 128, 17])], ids=str)
def test_values_that_are_the_beginnings_of_keys(queries, contexts, window):
    check(queries, contexts, window, heads=(4, 1), value_dim=40)
    check(queries, contexts, window, heads=(1, 1), value_dim=40, sinks=SINKS[1:2])


def test_a_row_of_a_latent_cache_has_the_same_bits_in_any_batch():
    """As wide as DeepSeek's."""
    of = {"heads": (16, 1), "head_dim": 576, "value_dim": 512}
    q, cache, tables, _, _ = case([70, 1, 3], [200, 130, 3], **of)
    together = np.asarray(attend(q, cache, tables, value_dim=512))
    for sequence, rows in enumerate((slice(0, 70), slice(70, 71), slice(71, 74))):
        for row in range(rows.start, rows.stop, 23):
            length = tables.positions[row : row + 1] + 1
            single = Tables(length - 1, jnp.asarray([0, 1]), length, tables.page_table[sequence : sequence + 1])
            assert np.array_equal(attend(q[row : row + 1], cache, single, value_dim=512)[0], together[row])


def test_a_latent_cache_has_a_derivative():
    q, cache, tables, k, _ = case([3], [40], heads=(4, 1), value_dim=32)

    def dense(q, k):
        scores = jnp.einsum("hd,pd->hp", q[2], k) * q.shape[-1] ** -0.5
        return (jax.nn.softmax(scores, axis=1) @ k[:, :32]).sum()

    found = jax.grad(lambda q: attend(q, cache, tables, value_dim=32)[2].sum())(q)
    assert np.allclose(found, jax.grad(dense)(q, jnp.asarray(k[:, 0], jnp.float32)), atol=1e-5) and np.abs(found).max() > 1e-3


def test_rows_of_no_sequence_are_zero():
    q, cache, tables, _, _ = case([3, 2], [3, 40], padding=4)
    y = np.asarray(attend(q, cache, tables))
    assert np.isfinite(y).all() and (y[5:] == 0).all()


def test_a_long_context():
    """There is no limit: 30,000 positions."""
    check([1], [30_000], heads=(2, 1), head_dim=16)


def test_temporaries_do_not_grow_with_the_context():
    def temporaries(pages):
        f32, i32 = jnp.float32, jnp.int32
        tables = Tables(*(jax.ShapeDtypeStruct(s, i32) for s in ((64,), (2,), (1,), (1, pages))))
        cache = jax.eval_shape(lambda: KVCache.empty(1, pages, 16, 2, 64, "float32"))
        compiled = jax.jit(attend).lower(jax.ShapeDtypeStruct((64, 4, 64), f32), cache, tables).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) <= temporaries(64) + 64 * 2048


def test_slots_of_minus_one_write_nowhere():
    cache = KVCache.empty(1, 2, 4, 1, 2, "float32")
    ones = jnp.ones((3, 1, 2))
    written = np.asarray(cache.write(0, jnp.asarray([-1, 5, -1]), ones, 2 * ones).pages)
    assert written.sum() == 6.0 and (written[0, 1, 1] == [[1, 1], [2, 2]]).all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_what_is_written_is_read(dtype):
    """K of head i at 2i and V at 2i + 1, rounded to the dtype; the largest finite numbers stay finite, NaN stays NaN."""
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((2, 3, 2, 8)) * 10.0 ** rng.integers(-4, 4, (2, 3, 2, 1))).astype(np.float32)
    k[0, 0], v[1, 1, 3] = 0.0, np.nan
    largest = float(jnp.finfo(dtype).max) if dtype != "int8" else 1e30
    k[2, 0, 0] = largest * (1 if dtype == "float32" else 1.0001)
    cache = KVCache.empty(2, 2, 2, 2, 8, dtype).write(1, jnp.asarray([2, -1, 1], jnp.int32), jnp.asarray(k), jnp.asarray(v))
    held = np.asarray(cache.read(1, jnp.arange(2))).reshape(4, 2, 2, 8)
    clipped = np.clip(k, -largest, largest) if dtype == "float8_e4m3fn" else k
    for slot, token in ((2, 0), (1, 2)):
        for i, values in enumerate((clipped, v)):
            assert np.allclose(held[slot, :, i], rounded(values[token], dtype), rtol=1e-7, atol=0, equal_nan=True)
    assert (held[[0, 3]] == 0).all() and (np.asarray(cache.read(0, jnp.arange(2))) == 0).all()


def test_nan_is_written_as_nan():
    for dtype in KV_DTYPES:
        nan = jnp.full((1, 1, 4), jnp.nan)
        cache = KVCache.empty(1, 1, 1, 1, 4, dtype).write(0, jnp.zeros(1, jnp.int32), nan, nan)
        assert np.isnan(np.asarray(cache.read(0, jnp.zeros(1, jnp.int32)))).all(), dtype


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_write_touches_no_more_than_it_writes(dtype):
    """No conversion of the whole array on the way, which is why some dtypes are kept as bits on CPU."""
    cache = jax.eval_shape(lambda: KVCache.empty(4, 256, 16, 2, 64, dtype))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert nbytes == 4 * 256 * 16 * bytes_per_token(dtype, 2, 64)
    new, slots = jax.ShapeDtypeStruct((8, 2, 64), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def write(cache, slots, k, v):
        return jax.lax.scan(lambda c, layer: (c.write(layer, slots, k, v), None), cache, jnp.arange(4))[0]

    memory = jax.jit(write, donate_argnums=0).lower(cache, slots, new, new).compile().memory_analysis()
    assert memory.alias_size_in_bytes == nbytes
    assert memory.temp_size_in_bytes <= 32 * 8 * 2 * 2 * 64


def test_the_backend_is_chosen_for_the_target():
    """And every KV dtype has one everywhere."""
    tables = Tables(*(jnp.zeros(shape, jnp.int32) for shape in ((2,), (3,), (2,), (2, 4))))
    chosen = {}
    for target in (
        dispatch.Target("cpu"),
        dispatch.Target("gpu", "7.5"),
        dispatch.Target("gpu", "9.0"),
        dispatch.Target("tpu", "v5e"),
    ):
        for dtype in KV_DTYPES:
            with dispatch.on(target), dispatch.record() as choices:
                make_metadata(tables, KVCache.empty(1, 4, 16, 2, 128, dtype), 4)
                make_metadata(tables, KVCache.empty(1, 4, 16, 2, 128, dtype), 4, sinks=True)
            with dispatch.on(target), dispatch.record() as of_latent:
                make_metadata(tables, KVCache.empty(1, 4, 16, 1, 576, dtype, latent=True), 16, value_dim=512)
            assert of_latent[0].backend == "xla"
            chosen[str(target), dtype] = choices[0].backend
            assert choices[-1].backend == ("xla" if target.platform == "tpu" else choices[0].backend)
    assert {chosen["cpu", dtype] for dtype in KV_DTYPES} == {chosen["gpu 7.5", dtype] for dtype in KV_DTYPES} == {"xla"}
    assert {chosen["gpu 9.0", dtype] for dtype in KV_DTYPES} == {"triton"}
    assert chosen["tpu v5e", "bfloat16"] == "mosaic_tpu" and chosen["tpu v5e", "float16"] == "xla"


def test_shapes_that_do_not_fit_are_refused():
    q, cache, tables, _, _ = case([1], [1])
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :3], cache, tables)
    metadata = make_metadata(tables, cache, 4)
    with pytest.raises(ValueError, match=r"sinks: \(4,\) with q .* and make_metadata\(sinks=False\)"):
        paged_attention(q, cache, LAYER, metadata, 1.0, jnp.zeros(4))
    for value_dim in (0, 8, 49):
        with pytest.raises(ValueError, match=f"value_dim {value_dim} and a cache .* do not fit"):
            attend(q, cache, tables, value_dim=value_dim)
    with pytest.raises(ValueError, match="a latent cache has a single head, not 2"):
        KVCache.empty(1, 1, 1, 2, 8, "float32", latent=True)
    with pytest.raises(ValueError, match="sinks: none"):
        paged_attention(q, cache, LAYER, make_metadata(tables, cache, 4, sinks=True), 1.0)


def test_the_table_of_what_reads_what_is_current():
    page = kv_table.PAGE.read_text(encoding="utf-8")
    assert kv_table.written(page) == page, "run python -m benchmarks.kv_table --write"
