"""The small kernels between the products of a layer, in interpret mode: routing, grouping, and heads into the cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, routing
from pallas_kernels.append import triton as append_triton
from pallas_kernels.append import xla as append_xla
from pallas_kernels.append.operands import Operands
from pallas_kernels.grouped_matmul import grouping, triton_grouping
from pallas_kernels.paged_attention import KVCache
from pallas_kernels.routing import Router
from pallas_kernels.routing import triton as route_triton
from support.routing import chosen

HOPPER = dispatch.Target("gpu", "9.0")


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (33, 60, 4), (4, 8, 2), (3, 7, 3), (2, 1, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing(tokens, experts, top_k, normalize):
    """Against NumPy in float64; rounded logits make ties, which go to the smaller id."""
    rng = np.random.default_rng(tokens * experts)
    logits = (rng.standard_normal((tokens, experts)) * 2).round(1).astype(np.float32)
    bias = (rng.standard_normal(experts) / 4).astype(np.float32)
    live = np.arange(tokens) != 2
    softmax, sigmoid = Router(top_k, normalize, 1.5), Router(top_k, normalize, 1.5, "sigmoid", 1e-20)
    for router, biases in ((softmax, None), (sigmoid, None), (sigmoid, bias)):
        ids, weights = route_triton.route(*map(jnp.asarray, (logits, live)), biases, router, interpret=True)
        expected, wanted = chosen(logits, biases, router)
        assert np.array_equal(ids, np.where(live[:, None], expected, experts))
        assert np.abs(np.asarray(weights) - wanted).max() <= 1e-6


def test_routing_by_groups_has_no_kernel():
    case = dispatch.Case("route", HOPPER, "F32", "float32", shape=(4, 16, 2), features=("groups of experts",))
    with dispatch.record() as choices:
        assert dispatch.choose(case, routing.BACKENDS) is routing.xla
    assert choices[0].reason == "triton: has no groups of experts"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "experts", "rows"), [(8, 128, 8), (256, 128, 16), (24, 60, 8), (7, 4, 4), (1, 1, 8)])
def test_grouping(count, experts, rows):
    """By a stable sort of NumPy: order, and tiles that cover each expert's rows once, in order."""
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, experts + 1, count)
        order, tiles = triton_grouping.group(jnp.asarray(ids, jnp.int32), experts, rows, interpret=True)
        assert np.array_equal(order, np.argsort(ids, kind="stable"))
        by_xla = grouping.group(jnp.asarray(ids, jnp.int32), experts, rows)
        assert np.array_equal(by_xla.order, order) and np.array_equal(by_xla.place[order], np.arange(count))
        for work in (tiles, grouping.Tiles(*by_xla[3:])):
            covered = [
                (int(e), place)
                for e, start, length in np.stack(work[:3], axis=1)[: work.num_tiles]
                for place in range(int(start), int(start + length))
            ]
            ordered = np.sort(ids)
            assert covered == [(int(e), place) for place, e in enumerate(ordered) if e < experts]
            assert int(work.num_tiles) == sum(-(-int(n) // rows) for n in np.bincount(ids, minlength=experts)[:experts])


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "half", "normed", "dtype"),
    [(5, 4, 2, 128, 64, True, "bfloat16"), (3, 6, 3, 80, 20, False, "float32"), (1, 2, 1, 64, 32, True, "float16")],
)
def test_heads_into_the_cache(tokens, heads, kv_heads, head_dim, half, normed, dtype):
    """Equal to plain XLA; bytes outside of the slots do not change, and slot -1 writes nowhere."""
    rng = np.random.default_rng(tokens)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    with dispatch.on(HOPPER):
        empty = KVCache.empty(3, 4, 8, kv_heads, head_dim, dtype)
    cache = KVCache(normal(*empty.pages.shape).astype(empty.pages.dtype), None, dtype)
    slots = jnp.asarray([9, -1, 30, 0, 17][:tokens], jnp.int32)
    rope = normal(tokens, 1, half), normal(tokens, 1, half)
    norms = ((normal(2, head_dim), 1), (normal(3, head_dim), 2)) if normed else (None, None)
    heads_of = (normal(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
    operands = Operands(*heads_of, cache, 2, slots, rope, *norms)
    q, written = append_triton.append(operands, 1e-6, interpret=True)
    q_expected, expected = append_xla.append(operands, 1e-6)
    assert np.abs(np.asarray(q - q_expected)).max() <= 2.0**-20 * np.abs(q_expected).max()
    ulp = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
    difference = np.abs(np.asarray(written.pages, np.float32) - np.asarray(expected.pages, np.float32))
    assert (difference <= ulp * np.abs(np.asarray(expected.pages, np.float32)) + 1e-7).all()
    touched = np.asarray(written.pages != cache.pages).any(axis=(3, 4)).reshape(3, -1)
    assert np.array_equal(np.flatnonzero(touched[2]), np.sort([s for s in np.asarray(slots) if s >= 0]))
    assert not touched[:2].any()
