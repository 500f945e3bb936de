"""The small kernels between the products of a layer, compiled: one launch each, no temporaries, the cache aliased."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, dispatch
from pallas_kernels.append import append
from pallas_kernels.grouped_matmul import triton_grouping
from pallas_kernels.paged_attention import KVCache
from pallas_kernels.routing import Router, route

GPUS = ("a100-40g", "l4", "h200")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def launches(compiled) -> int:
    text = compiled.as_text()
    return text.count(" custom-call(") + text.count(" fusion(") + text.count(" copy(")


@pytest.mark.parametrize("target", GPUS)
def test_routing_and_grouping(target):
    compiled = aot.compile_for(
        target, lambda x, live: route(x, live, Router(8)), f32(32, 128), jax.ShapeDtypeStruct((32,), bool)
    )
    assert launches(compiled) <= 2  # bools become integers
    compiled = aot.compile_for(target, lambda ids: triton_grouping.group(ids, 128, 8), i32(256))
    assert launches(compiled) == 1


@pytest.mark.parametrize("target", GPUS)
def test_heads_into_the_cache(target):
    with dispatch.on(aot.TARGETS[target].target):
        cache = jax.eval_shape(lambda: KVCache.empty(48, 4096, 16, 4, 128, "bfloat16"))

    def step(cache, q, k, v, cos, sin, norm, layer, slots):
        return append(q, k, v, cache, layer, slots, (cos, sin), (norm, layer), (norm, layer), 1e-6)

    heads = (f32(32, n, 128) for n in (32, 4, 4))
    angles = f32(32, 1, 64), f32(32, 1, 64)
    compiled = aot.compile_for(target, step, cache, *heads, *angles, f32(48, 128), i32(), i32(32), donate_argnums=0)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache.pages.size * 2 and memory.temp_size_in_bytes <= 1024
    assert launches(compiled) == 1
