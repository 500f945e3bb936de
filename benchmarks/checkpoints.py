"""How fast checkpoints load, compared with a plain read of the same bytes, and how fast weights are quantized.

    python -m benchmarks.checkpoints MODEL.gguf

All files are in the page cache and every read goes to fresh memory. The three are measured in turn; the result holds the best
of each, because disturbances only ever slow a read. The same run checks that the Orbax checkpoint loads as the same parameters,
and that quantized weights are off by what their format explains.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from ferrum_jax.convert import convert
from ferrum_jax.distributed import Placement
from ferrum_jax.loading import check
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.stream import read_parameters
from pallas_kernels.blocks import unpack
from pallas_kernels.blocks.quantize import quantize

TURNS = 12
READ_BYTES = 16 << 20
FORMATS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL")


def plain_read(path: Path) -> float:
    """Bytes per second."""
    begin = time.perf_counter()
    out = np.empty(path.stat().st_size, np.uint8)
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(out):
            done += file.readinto(out.data[done : done + READ_BYTES])
    return len(out) / (time.perf_counter() - begin)


def load(path: Path) -> tuple[float, Any]:
    """Bytes of weights loaded per second, from the checked header to arrays on the device, and the arrays."""
    with open_model(path) as source:
        _, places, _ = check(source)
        begin = time.perf_counter()
        params = jax.block_until_ready(read_parameters(source, places, Placement.of()))
        return source.tensor_bytes / (time.perf_counter() - begin), params


def loading(path: Path, folder: Path) -> dict[str, Any]:
    saved = convert(path, folder / "saved", to="orbax")
    same = zip(*(jax.tree.leaves(load(source)[1]) for source in (path, saved)), strict=True)
    equal = all(np.array_equal(a, b) for a, b in same)
    turns = []
    for _ in range(TURNS):
        common.wait_for_quiet()
        turns.append((plain_read(path), load(path)[0], load(saved)[0]))
    read, gguf, orbax = (max(rates) for rates in zip(*turns, strict=True))
    return {
        "plain_read_gb_s": round(read / 1e9, 3),
        "gguf_gb_s": round(gguf / 1e9, 3),
        "orbax_gb_s": round(orbax / 1e9, 3),
        "gguf_ratio": round(gguf / read, 3),
        "orbax_ratio": round(orbax / read, 3),
        "content_check": {"equal": equal},
    }


def quantizing(format: str) -> dict[str, Any]:
    values = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    quantize(values[:1], format)  # compiles
    seconds, others, blocks = common.sample(lambda: quantize(values, format))
    error = np.sqrt(np.mean((np.asarray(unpack(blocks[:64], format)) - values[:64]) ** 2))
    return {
        "format": format,
        "weights_per_s": round(values.size / seconds),
        "float32_gb_s": round(values.nbytes / seconds / 1e9, 3),
        "others_cores": others,
        "content_check": {"rms_error": round(float(error), 5)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"loading": loading(options.model, Path(folder)), "quantizing": [quantizing(format) for format in FORMATS]}
    common.write("checkpoints", {"bytes": options.model.stat().st_size} | result)


if __name__ == "__main__":
    main()
