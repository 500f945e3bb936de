"""Which backend reads a KV cache of which dtype on which device: `python -m benchmarks.kv_table [--compile] [--write]`.

The table shows what the dispatcher chooses for the heads of Qwen3-30B-A3B (32 query and 4 KV heads of 128). --compile compiles
each cell as well, without the devices; --write puts the table into docs/kernels-attention.md.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from ferrum_jax.units import shown_dtype
from pallas_kernels import aot, dispatch
from pallas_kernels.paged_attention import KV_DTYPES, KVCache, Tables, make_metadata, paged_attention

PAGE = Path(__file__).parents[1] / "docs" / "kernels-attention.md"
BEGIN, END = "<!-- kv-table -->\n", "<!-- /kv-table -->\n"
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
TARGETS = {"CPU": dispatch.Target("cpu")} | {
    name: aot.TARGETS[name].target for name in ("t4", "a100-40g", "l4", "h200", *aot.TPUS)
}


def arguments(dtype: str, target: dispatch.Target):
    """A decode step of four sequences of up to 4,096 tokens, abstract."""
    with dispatch.on(target):
        cache = jax.eval_shape(functools.partial(KVCache.empty, 2, 1024, 16, KV_HEADS, HEAD_DIM, dtype))
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return (
        jax.ShapeDtypeStruct((4, HEADS, HEAD_DIM), jnp.float32),
        cache,
        Tables(i32((4,)), i32((5,)), i32((4,)), i32((4, 256))),
    )


def attend(q, cache, tables):
    return paged_attention(q, cache, 1, make_metadata(tables, cache, HEADS), HEAD_DIM**-0.5)


def choice(dtype: str, target: dispatch.Target) -> dispatch.Choice:
    """The backend that the dispatcher takes."""
    _, cache, tables = arguments(dtype, target)
    with dispatch.on(target), dispatch.record() as choices:
        jax.eval_shape(lambda: make_metadata(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tables), cache, HEADS).work)
    return choices[0]


def table() -> str:
    """Markdown: a row for each dtype, a column for each target, and the reason where a target's kernel is not taken."""
    rows = [["KV dtype", *TARGETS], ["---"] * (1 + len(TARGETS))]
    reasons: dict[str, None] = {}
    for dtype in KV_DTYPES:
        cells = [choice(dtype, target) for target in TARGETS.values()]
        rows.append([shown_dtype(dtype), *(cell.backend for cell in cells)])
        for target, cell in zip(TARGETS.values(), cells, strict=True):
            own = {"gpu": "triton: ", "tpu": "mosaic_tpu: "}.get(target.platform)
            if own and cell.backend == "xla":
                why = next(part for part in cell.reason.split("; ") if part.startswith(own))
                reasons[f"* {target.platform.upper()}, {why}"] = None
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + "\n".join(reasons) + "\n"


def written(text: str) -> str:
    """The page with the current table."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile every cell (takes the wheels of the aot extra)")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    if options.compile:
        for name in (name for name in TARGETS if name in aot.TARGETS):
            for dtype in KV_DTYPES:
                memory = aot.compile_for(name, attend, *arguments(dtype, TARGETS[name])).memory_analysis()
                print(f"{name} {dtype}: compiled, {memory.temp_size_in_bytes:,} bytes of temporaries")
    if options.write:
        PAGE.write_text(written(PAGE.read_text()))
    print(table())


if __name__ == "__main__":
    main()
