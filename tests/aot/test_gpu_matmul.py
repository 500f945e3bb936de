"""The Triton kernels for compressed matrices, compiled for absent GPUs at the shapes of Qwen3-30B-A3B.

No register spills, no copy of a layer, an expert or an unpacked matrix, and at most the instructions per weight given here,
where a slower lowering would show first. Instructions can be read only up to jax 0.11; spills and temporaries are checked with
every version.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import GPUS
from pallas_kernels.blocks import gpu
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.grouped_matmul import triton as grouped
from pallas_kernels.grouped_matmul import triton_grouping
from pallas_kernels.quantized_matmul import triton as dense
from support.aot import ptx

TARGETS = ["a100-40g", "l4", "h200"]
HIDDEN, EXPERT, LAYERS, EXPERTS, TOP_K = 2048, 768, 48, 128, 8

# Instructions a weight of the loop over k: with up to 16 rows of x, and with any number. At 4.3 TB/s an H200 has issue
# slots for 4.4 of them a weight of Q4_K, 5.3 of Q5_K, 6.4 of Q6_K and 8.3 of Q8_0.
CEILINGS = {
    "Q4_0": (2.6, 3.7),
    "Q4_1": (2.7, 3.8),
    "Q5_0": (3.9, 5.0),
    "Q5_1": (4.0, 5.0),
    "Q8_0": (2.9, 4.0),
    "Q4_K": (3.2, 4.7),
    "Q5_K": (4.5, 5.6),
    "Q6_K": (4.4, 5.5),
    "IQ4_NL": (5.4, 6.5),
    "IQ4_XS": (5.8, 6.9),
    "MXFP4": (4.3, 5.4),
}


def stacked(format, n, k, *stack):
    """An abstract matrix of the first of some stacked layers."""
    planes = tuple(jax.ShapeDtypeStruct((*stack, *p.shape), p.dtype) for p in gpu.plane_shapes(format, n, k))
    return Matrix(planes, (jax.ShapeDtypeStruct((), jnp.int32),), format, "gpu", n, k)


def activations(m, k, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((m, k), dtype)


def room(m, n, k):
    """Bytes that a product may hold for a while: x in the order of the planes, and the parts of its sum."""
    parts = dense.parts_of(m, n, k)
    return 2 * m * k + (4 * parts * m * n if parts > 1 else 0) + 4096


def lean(kernel, tile, formats, few, k, parts=1):
    """Checks that a kernel that sums products with matrices of these formats does not spill and keeps its limits.

    A short loop is unrolled: then all of the kernel counts, and one instruction a weight more is allowed.
    """
    steps = 1 if kernel.loop else k // 256 // parts
    weights = steps * tile.rows * 256 * len(formats)
    ceiling = sum(CEILINGS[format][0 if few else 1] for format in formats) / len(formats)
    length = kernel.loop or kernel.instructions
    assert length * tile.warps * 32 / weights <= ceiling + (0 if kernel.loop else 1)


@pytest.mark.parametrize("m", [1, 512])
@pytest.mark.parametrize("format", gpu.PACKINGS)
@pytest.mark.parametrize("target", ["a100-40g", "h200"])
def test_every_format(target, format, m):
    on = GPUS[target].target
    matrix = stacked(format, HIDDEN, 4096, LAYERS)
    kernels, temporaries = ptx.measure(target, lambda x, w: dense.matmul(x, w, on), activations(m, 4096), matrix)
    assert temporaries <= room(m, HIDDEN, 4096)
    ptx.need_kernels()
    parts = dense.parts_of(m, HIDDEN, 4096)
    lean(kernels["matmul"], dense.tile(m, [matrix], HIDDEN * parts, on), [format], m <= 16, 4096, parts)


@pytest.mark.parametrize(("format", "dtype"), [("Q4_K", "bfloat16"), ("Q4_K", "float16"), ("IQ4_XS", "bfloat16")])
@pytest.mark.parametrize("m", [8, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_swiglu(target, m, format, dtype):
    on = GPUS[target].target
    matrix = stacked(format, 6144, HIDDEN, LAYERS)
    kernels, temporaries = ptx.measure(
        target, lambda x, gate, up: dense.swiglu(x, gate, up, on), activations(m, HIDDEN, dtype), matrix, matrix
    )
    assert temporaries <= 2 * m * HIDDEN + 4096
    ptx.need_kernels()
    assert "swiglu" in kernels


@pytest.mark.parametrize("m", [1, 32, 512])
@pytest.mark.parametrize("target", TARGETS)
def test_projections_of_mixed_formats_are_one_launch(target, m):
    on = GPUS[target].target
    parts = [stacked("Q4_K", 4096, HIDDEN, LAYERS), stacked("Q4_K", 512, HIDDEN, LAYERS), stacked("Q6_K", 512, HIDDEN, LAYERS)]
    kernels, temporaries = ptx.measure(target, lambda x, *parts: dense.matmuls(x, parts, on), activations(m, HIDDEN), *parts)
    assert temporaries <= room(m, 5120, HIDDEN)
    ptx.need_kernels()
    assert [name for name in kernels if name.startswith("matmul")] == ["matmul"]
    lean(
        kernels["matmul"],
        dense.tile(m, parts[:1], 5120 * dense.parts_of(m, 5120, HIDDEN), on),
        ["Q6_K"],
        m <= 16,
        HIDDEN,
        dense.parts_of(m, 5120, HIDDEN),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_output(target):
    on = GPUS[target].target
    matrix = stacked("Q6_K", 151_936, HIDDEN, 1)
    kernels, temporaries = ptx.measure(target, lambda x, w: dense.matmul(x, w, on), activations(8, HIDDEN), matrix)
    assert temporaries <= room(8, 151_936, HIDDEN)
    ptx.need_kernels()
    lean(kernels["matmul"], dense.tile(8, [matrix], 151_936, on), ["Q6_K"], True, HIDDEN)


@pytest.mark.parametrize("tokens", [1, 8, 32, 512])
@pytest.mark.parametrize("last", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("target", TARGETS)
def test_experts(target, last, tokens):
    """Stacks of 5.4 GB (addressed with 64 bits): temporaries are the rows' own, whatever the number of experts."""
    on = GPUS[target].target
    gate = stacked("Q4_K", EXPERT, HIDDEN, LAYERS, EXPERTS)
    down = stacked(last, HIDDEN, EXPERT, LAYERS, EXPERTS)
    rows = tokens * TOP_K
    arguments = (
        activations(tokens, HIDDEN),
        jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32),
        jax.ShapeDtypeStruct((tokens, TOP_K), jnp.float32),
    )
    kernels, temporaries = ptx.measure(target, lambda *args: grouped.expert_ffn(*args, on), *arguments, gate, gate, down)
    tables = 4096 + (600 * rows if rows > triton_grouping.MOST else 16 * (rows + EXPERTS))
    assert temporaries <= 2 * tokens * HIDDEN + rows * (2 * EXPERT + 4 * HIDDEN) + tables
    ptx.need_kernels()
    tile = grouped._tile(rows, EXPERTS, (gate, gate), on)
    lean(kernels["expert_gate_up"], tile, ["Q4_K", "Q4_K"], tile.batch <= 16, HIDDEN)
    assert ("expert_grouping" in kernels) == (1 < tokens <= 32)
    assert len(kernels) <= 5 or tokens > 32
