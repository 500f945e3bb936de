"""Compiles the TPU kernels for compressed matrices for one target and prints the results as JSON.

    python -m support.aot.tpu_kernels v5e

For each case: bytes of temporaries, launches of kernels, and of each kernel the bundles of its final program (one is issued a
cycle; loops and both sides of branches count once) and the vector registers spilled in it, from libtpu's own dump. A separate
process, because libtpu reads the setting for the dump when it is loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import tempfile

DUMP = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels import aot  # noqa: E402
from pallas_kernels.blocks import tpu  # noqa: E402
from pallas_kernels.blocks.matrix import Matrix  # noqa: E402
from pallas_kernels.grouped_matmul import mosaic_tpu as grouped  # noqa: E402
from pallas_kernels.quantized_matmul import mosaic_tpu as dense  # noqa: E402
from support.aot import delta_net  # noqa: E402

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K, VOCABULARY = 4, 128, 2048, 768, 8, 151936
SPILL = 9  # column of the utilization table
TARGET = sys.argv[1] if len(sys.argv) > 1 else ""


def matrix(format, n, k, *stack):
    """Abstract: the first of the stacked layers, with the experts' axis left."""
    planes = tuple(jax.ShapeDtypeStruct((*stack, *p.shape), p.dtype) for p in tpu.plane_shapes(format, n, k))
    return Matrix(planes, (jax.ShapeDtypeStruct((), jnp.int32),) * bool(stack), format, "tpu", n, k)


def rows(m, k):
    return jax.ShapeDtypeStruct((m, k), jnp.bfloat16)


def feed_forward(tokens, down, hidden=HIDDEN, width=WIDTH, experts=EXPERTS, top_k=TOP_K):
    routed = (jax.ShapeDtypeStruct((tokens, top_k), jnp.int32), jax.ShapeDtypeStruct((tokens, top_k), jnp.float32))
    gate = matrix("Q4_K", width, hidden, LAYERS, experts)
    return ffn, rows(tokens, hidden), *routed, gate, gate, matrix(down, hidden, width, LAYERS, experts)


def ffn(x, experts, weights, gate, up, down):
    return grouped.expert_ffn(x, experts, weights, gate, up, down, aot.TPUS[TARGET].target)


def matmuls(x, *matrices):
    return dense.matmuls(x, matrices, aot.TPUS[TARGET].target)


def swiglu(x, gate, up):
    return dense.swiglu(x, gate, up, aot.TPUS[TARGET].target)


def cases():
    """name -> (function, *abstract arguments). The shapes are those of Qwen3-30B-A3B."""
    for format in tpu.PACKINGS:
        for m in (1, 8, 64):
            yield f"{format}, {m} rows", (matmuls, rows(m, HIDDEN), matrix(format, 1024, HIDDEN, LAYERS))
    for m in (1, 8, 32, 512):
        qkv = [matrix(format, n, HIDDEN, LAYERS) for format, n in (("Q4_K", 4096), ("Q4_K", 512), ("Q6_K", 512))]
        yield f"qkv, {m} rows", (matmuls, rows(m, HIDDEN), *qkv)
        yield f"o, {m} rows", (matmuls, rows(m, 4096), matrix("Q4_K", HIDDEN, 4096, LAYERS))
    for m in (1, 32):
        yield f"output, {m} rows", (matmuls, rows(m, HIDDEN), matrix("Q6_K", VOCABULARY, HIDDEN))
    for m in (8, 512):
        gate = matrix("Q4_K", 6144, HIDDEN, LAYERS)
        yield f"swiglu, {m} rows", (swiglu, rows(m, HIDDEN), gate, gate)
        yield f"k = 28672, {m} rows", (matmuls, rows(m, 28672), matrix("Q4_K", 8192, 28672, LAYERS))
    for tokens, down in ((1, "Q6_K"), (1, "Q4_K"), (32, "Q6_K"), (128, "Q4_K"), (512, "Q6_K"), (2048, "Q4_K")):
        yield f"experts, {tokens} tokens, down {down}", feed_forward(tokens, down)
    for tokens in (4, 512):
        yield f"large experts, {tokens} tokens", feed_forward(tokens, "Q6_K", 4096, 14336, 8, 2)
    yield "pack", (lambda blocks: tpu.pack(blocks, "Q6_K"), jax.ShapeDtypeStruct((VOCABULARY, 1680), jnp.uint8))
    output = matrix("Q6_K", VOCABULARY, HIDDEN).planes
    yield "look up", (look_up, output, jax.ShapeDtypeStruct((32,), jnp.int32))
    for batch in ("decode", "mixed"):
        yield f"delta net, {batch}", (delta_net.step, *delta_net.arguments(batch))


def look_up(planes, ids):
    return tpu.decode(tpu.gather(planes, ids), "Q6_K", len(ids), HIDDEN)


def measure(function, *args) -> dict:
    for old in pathlib.Path(DUMP.name).iterdir():
        old.unlink()
    donated = (0,) if function is delta_net.step else ()
    compiled = aot.compile_for(TARGET, function, *args, donate_argnums=donated)
    found: dict = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "launches": 0, "kernels": {}}
    for file in pathlib.Path(DUMP.name).glob("*final_hlo-static-per-bundle-utilization.txt"):
        name = re.match(r"\d+-(.*)-\d+-final_hlo", file.name)[1].split(".")[0]
        if name.startswith(("few_rows", "many_rows", "grouped", "expert_ffn", "group_few", "delta_net")):
            found["launches"] += 1
            bundles = [line.split() for line in file.read_text().splitlines() if re.fullmatch(r"(\d+\s*){11}", line.strip())]
            found["kernels"][name] = {"bundles": len(bundles), "spills": sum(int(b[SPILL]) for b in bundles)}
    return found


if __name__ == "__main__":
    with DUMP:
        print(json.dumps({name: measure(*case) for name, case in cases()}))
