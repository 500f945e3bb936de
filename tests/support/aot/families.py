"""Compiles steps of Qwen3.6-35B-A3B and gpt-oss-20b (the layers of one period, real shapes, no weights) for one target.

    python -m support.aot.families TARGET

prints one JSON object: for each model and step the memory of its program and the chosen backends. A separate process, because a
compiler may abort.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from ferrum_jax import functional as F
from ferrum_jax import headers
from ferrum_jax.config import Attention, GatedDeltaNet, LayerSpec, Mixture
from ferrum_jax.distributed import Placement
from ferrum_jax.loading import auto_dtype
from ferrum_jax.programs import COMPILER_OPTIONS
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels import aot, dispatch
from support.aot.steps import shorten

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

CONTEXT = 4096
# Layers of one period: three that recur and one that attends; one with a window and one without.
MODELS = {"qwen3.6:35b-a3b": 4, "gpt-oss:20b": 2}
# One step for each kind of target, because a compilation takes 15 s: its name, tokens, sequences.
STEPS = {"gpu": ("prefill of 512", 512, 1), "tpu": ("decode of 8", 8, 8)}


def main(target: str) -> None:
    kind, report = aot.TARGETS[target].target, {}
    for model, layers in MODELS.items():
        header = headers.bundled(model)
        shorten(header, layers)
        config = dataclasses.replace(header.config(), dtype=auto_dtype(kind))
        params = abstract_parameters(parameters(header, config), Placement.abstract(kind))
        name, tokens, sequences = STEPS[kind.platform]
        report[f"{model}, {name}"] = measure(target, config, params, tokens, sequences)
    json.dump(report, sys.stdout)


def measure(target: str, config: Any, params: Any, tokens: int, sequences: int) -> dict[str, Any]:
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    sizes = {"num_pages": sequences * CONTEXT // 16, "dtype": config.dtype, "num_states": 2 * sequences}
    with dispatch.on(aot.TARGETS[target].target):
        cache = jax.eval_shape(functools.partial(F.new_cache, config, **sizes))
    batch = F.RaggedBatch(
        *(i32((tokens,)) for _ in range(3)), i32((sequences + 1,)), i32((sequences,)),
        i32((sequences, CONTEXT // 16)), i32((sequences,)),
    )  # fmt: skip
    options = COMPILER_OPTIONS.get("gpu" if target in aot.GPUS else "tpu")
    step = functools.partial(F.forward, config=config)
    with dispatch.record() as choices:
        compiled = aot.compile_for(target, step, params, cache, batch, donate_argnums=1, compiler_options=options)
    memory = compiled.memory_analysis()
    return {
        "tokens": tokens,
        "numbers": tokens * (6 * config.hidden_size + max(map(held, config.layers))) + 3 * sequences * config.vocab_size,
        "cache_bytes": nbytes(cache),
        "page_bytes": nbytes(cache.pools),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "choices": sorted({(choice.operation, choice.format, choice.backend) for choice in choices}),
    }


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held(spec: LayerSpec) -> int:
    """Numbers that a layer holds for a token next to the residual stream."""
    mixer, experts = spec.mixer, spec.feed_forward
    assert isinstance(experts, Mixture)
    if isinstance(mixer, Attention):
        own = 6 * mixer.num_heads * mixer.head_dim
    else:
        assert isinstance(mixer, GatedDeltaNet)
        own = 4 * mixer.channels + 6 * mixer.value_heads * mixer.value_dim
    return own + experts.experts_per_token * 4 * experts.width


if __name__ == "__main__":
    main(sys.argv[1])
