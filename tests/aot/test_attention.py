"""Attention at the shapes of Qwen3-30B-A3B, compiled for every target: temporaries, aliasing, registers, length of loops.

The step writes the cache and attends to it, scanned over layers, as a model does.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, dispatch
from pallas_kernels.paged_attention import KV_DTYPES, KVCache, Tables, make_metadata, paged_attention
from support.aot import ptx

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 32, 4, 128, 16
GPUS, TPUS = ("a100-40g", "l4", "h200"), ("v5e", "v6e", "v5p")
# name: tokens of the step, sequences, pages of a sequence
BATCHES = {"decode": (32, 32, 512), "mixed": (512, 8, 512)}
# Instructions of a warp for a KV tile (32 positions; 64 on the H200 except for float32): the limit is what was compiled plus a
# tenth. First for one token and one range (4 warps; float32 8), then for many tokens, with the loop over ranges around it (8
# warps). The H200 has 7,900 for each SM in the time in which 64 positions come from memory in 16 bits, half of it in 8.
CEILINGS = {
    "float32": {"8": (980, 2000), "h200": (980, 2000)},
    "bfloat16": {"8": (420, 1400), "h200": (420, 1320)},
    "float16": {"8": (420, 1400), "h200": (420, 1320)},
    "int8": {"8": (440, 900), "h200": (580, 1030)},
    "float8_e4m3fn": {"8": (460, 860), "h200": (700, 1000)},
}


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def step(cache, q, k, v, slots, tables, window=0):
    metadata = make_metadata(tables, cache, HEADS, window)

    def body(carry, layer):
        x, cache = carry
        cache = cache.write(layer, slots, k, v)
        return (x + paged_attention(x, cache, layer, metadata, HEAD_DIM**-0.5), cache), None

    return jax.lax.scan(body, (q, cache), jnp.arange(LAYERS, dtype=jnp.int32))[0]


def arguments(target, dtype, batch, pool=None):
    tokens, sequences, pages = BATCHES[batch]
    with dispatch.on(aot.TARGETS[target].target):
        cache = jax.eval_shape(lambda: KVCache.empty(LAYERS, pool or 4096, PAGE, KV_HEADS, HEAD_DIM, dtype))
    q, k, v = (jax.ShapeDtypeStruct((tokens, heads, HEAD_DIM), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return cache, q, k, v, i32(tokens), Tables(i32(tokens), i32(sequences + 1), i32(sequences), i32(sequences, pages))


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def compiled(target, dtype, batch, pool=None):
    """(backend, bytes of temporaries, of what is aliased, of the cache)"""
    operands = arguments(target, dtype, batch, pool)
    with dispatch.record() as choices:
        memory = aot.compile_for(target, step, *operands, donate_argnums=0).memory_analysis()
    return choices[0].backend, memory.temp_size_in_bytes, memory.alias_size_in_bytes, nbytes(operands[0])


def temporaries(batch) -> int:
    """Bytes of q and of what goes in and out of the kernels, and of the partial results of the tokens that have ranges of
    256 positions to themselves: output, best and total of each."""
    tokens, sequences, pages = BATCHES[batch]
    partials = sequences * -(-pages * PAGE // 256) * HEADS * (HEAD_DIM + 2)
    return 4 * (partials + 3 * tokens * HEADS * HEAD_DIM + 4 * tokens * KV_HEADS * HEAD_DIM) + (1 << 20)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("target", GPUS)
def test_gpu(target, dtype, batch):
    kernels, temp = ptx.measure(target, step, *arguments(target, dtype, batch))
    assert temp <= temporaries(batch) + nbytes(arguments(target, dtype, batch)[0])  # the cache is not donated here
    kernels = {name: kernel for name, kernel in kernels.items() if name.startswith("paged_attention")}
    ptx.need_kernels()
    many = {"paged_attention"} if batch == "mixed" else set()
    assert set(kernels) == {"paged_attention_splits", "paged_attention_merge"} | many
    ceilings = dict(
        zip(("paged_attention_splits", "paged_attention"), CEILINGS[dtype]["h200" if target == "h200" else "8"], strict=True)
    )
    for name, kernel in kernels.items():
        assert 0 < kernel.loop <= ceilings.get(name, 700), kernel


@pytest.mark.parametrize("batch", BATCHES)
def test_sinks_cost_no_registers(batch):
    """The kernels that finish rows read them: `ptx.measure` fails where one spills."""
    cache, q, *_, tables = arguments("h200", "bfloat16", batch)

    def attend(cache, q, tables, sinks):
        return paged_attention(q, cache, 1, make_metadata(tables, cache, HEADS, sinks=True), 1.0, sinks)

    kernels, _ = ptx.measure("h200", attend, cache, q, tables, jax.ShapeDtypeStruct((HEADS,), jnp.float32))
    ptx.need_kernels()
    ceilings = dict(zip(("paged_attention_splits", "paged_attention"), CEILINGS["bfloat16"]["h200"], strict=True))
    for name, kernel in kernels.items():
        assert not name.startswith("paged_attention") or 0 < kernel.loop <= ceilings.get(name, 700), kernel


@pytest.mark.parametrize(
    ("dtype", "batch", "pool"), [("float16", "mixed", 4096), ("bfloat16", "decode", 1 << 16), ("int8", "decode", 3 << 16)]
)
@pytest.mark.parametrize("target", ["a100-40g", "h200"])
def test_gpu_caches_are_never_copied(target, dtype, batch, pool):
    """Also over 4 GiB, and over 2 GiB of one byte an element."""
    backend, temp, alias, size = compiled(target, dtype, batch, pool)
    assert backend == "triton" and alias == size and temp <= temporaries(batch)


def test_a_page_table_of_one_range_is_one_launch():
    cache, q, *_ = arguments("h200", "bfloat16", "decode")
    tables = Tables(i32(32), i32(33), i32(32), i32(32, 16))

    def attend(cache, q, tables):
        return paged_attention(q, cache, 1, make_metadata(tables, cache, HEADS), 1.0)

    kernels, temp = ptx.measure("h200", attend, cache, q, tables)
    assert temp <= 1 << 16
    ptx.need_kernels()
    assert [name for name in kernels if name.startswith("paged")] == ["paged_attention"]


@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_tpu(target, dtype, batch):
    backend, temp, alias, size = compiled(target, dtype, batch)
    assert backend == "mosaic_tpu" and alias == size and temp <= temporaries(batch)


@pytest.mark.parametrize(("target", "dtype"), [("t4", "float16"), ("t4", "int8"), ("v5e", "float16"), ("v5e", "int8")])
@pytest.mark.parametrize("batch", BATCHES)
def test_plain_xla(target, dtype, batch):
    backend, temp, alias, size = compiled(target, dtype, batch)
    assert backend == "xla" and alias == size and temp <= 3 * temporaries(batch)
