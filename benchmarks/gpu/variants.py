"""Choices that only a device can settle, each measured against the package's own in the same process.

Command buffers (CUDA graphs): XLA captures the body of a loop by default; with WHILE the whole loop becomes one graph
whose condition the device evaluates. Arithmetic: float16 has three more bits than bfloat16 and needs less work to make
weights of 4 bits, but a smaller range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from benchmarks.gpu import weights, whole
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.model import measure_decode

COMPILED_ELSEWHERE = (weights.draw, weights.normal, whole.filled_cache)
GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION"
COMMAND_BUFFERS = {"whole loops": GRAPHS + ",WHILE", "loop bodies": GRAPHS, "none": ""}


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    absent = lab.rehearsal and lab.collecting
    made: dict[str, object] = {}
    # What differs from the section "model" only in options or dtype need not be compiled with all its layers again.
    whole_model = dataclasses.replace(lab.sizes.config, num_layers=1) if absent else lab.sizes.config

    def params():
        if not made:
            made["params"] = weights.make(lab, whole_model)
        return made["params"]

    def measure(name: str, batch: int, dtype: str = "bfloat16", **options) -> Iterator[dict]:
        config = dataclasses.replace(whole_model, dtype=dtype)
        with lab.options(**options):
            decoding = whole.Decoding(lab, params(), config, batch)
            yield from measure_decode(lab, f"decode, batch {batch}, {name}", decoding)

    for batch in (1, lab.sizes.batch)[: 2 if lab.sizes.real else 1]:
        if not absent:
            yield f"package, {batch}", lambda batch=batch: measure("as the package compiles", batch)
        for name, types in COMMAND_BUFFERS.items():
            if (batch == 1 or name != "none") and not (lab.rehearsal and (batch, name) != (1, "whole loops")):
                option = {"xla_gpu_enable_command_buffer": types}
                yield f"graphs of {name}, {batch}", lambda b=batch, n=name, o=option: measure(f"CUDA graphs: {n}", b, **o)
        if batch == 1 or not absent:
            yield f"float16, {batch}", lambda batch=batch: measure("float16", batch, "float16")
