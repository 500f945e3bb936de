"""The whole decode and prefill steps of Qwen3-30B-A3B, compiled for every target: the memory they need besides the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pallas_kernels import aot

pytestmark = pytest.mark.timeout(1800)  # the first test of a target compiles its steps

KERNELS = {"gpu": "triton", "tpu": "mosaic_tpu"}
TARGETS = ("t4", "a100-40g", "l4", "h200", "v5e", "v6e", "v5p")


@pytest.fixture
def report(target: str, compiled_by: Callable) -> dict:
    """What support.aot.steps reports for the target."""
    told = compiled_by("steps", target)
    assert len(told["steps"]) == 3 and len(told.get("engine", "abc")) == 3
    return told


def bound(report: dict, step: dict) -> int:
    """Temporaries a step may have, from its shapes: the activations of one layer, the logits, and two tiles of 8 MiB.

    Anything that must not be there is larger than the difference: the experts of a layer as they are stored (325 MiB), or
    unpacked (2.3 GiB); every row times every expert (decode of 8: 12 MiB a product); a slice of q (4.5 MiB).
    """
    rows = step["tokens"] * report["top_k"]
    activations = step["tokens"] * (6 * report["hidden"] + 4 * report["q_width"])
    activations += rows * (report["hidden"] + 2 * report["width"])
    partials = step["tokens"] * report["q_width"] * (4096 // 256 + 1) if step["tokens"] <= 16 else 0
    return 4 * (activations + partials + 3 * step["sequences"] * report["vocab"]) + (2 << 20)


@pytest.mark.parametrize("target", TARGETS)
def test_the_steps_compile_alias_the_cache_and_copy_no_weights(target, report):
    for name, step in report["steps"].items():
        assert step["alias_bytes"] >= step["cache_bytes"], name
        fallback = (24 << 20) if target == "t4" else 0  # unpacked tiles of plain XLA
        assert step["temp_bytes"] <= bound(report, step) + fallback, (name, step["temp_bytes"] / 2**20)


@pytest.mark.parametrize("target", ("t4", "h200", "v5e"))
def test_the_steps_of_the_engine_alias_cache_and_slots(target, report):
    """The sampler's temporaries are rows of the vocabulary; a TPU may lay 8 of them out as 128."""
    row = 4 * report["vocab"] * (128 if target.startswith("v") else 8)
    for name, step in report["engine"].items():
        assert step["alias"] >= step["donated"], name
        assert step["temp"] <= 8 * row + (96 << 20), (name, step["temp"] / 2**20)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_are_taken(target, report):
    kind = aot.TARGETS[target].target
    for name, step in report["steps"].items():
        taken = {(c["operation"], c["format"]): c["backend"] for c in step["choices"]}
        expected = "xla" if target == "t4" else KERNELS[kind.platform]
        for operation in ("quantized_matmul", "expert_ffn"):
            served = "composed" if (operation, expected) == ("expert_ffn", "xla") else expected
            for format in ("Q4_K", "Q6_K"):
                assert taken[operation, format] == served, (name, operation, format)
        assert taken["paged_attention", "float16" if target == "t4" else "bfloat16"] == expected, name


# Launches of one pass of the loops over layers with one body (B) and with three (A A B), as counted. XLA cuts its own small
# products otherwise on an L4.
LAUNCHES = {
    "h200": {"decode of 1": (18, 48), "decode of 8": (22, 53)},
    "a100-40g": {"decode of 1": (21, 57), "decode of 8": (25, 62)},
    "l4": {"decode of 1": (22, 62), "decode of 8": (38, 80)},
}


@pytest.mark.parametrize("target", LAUNCHES)
def test_launches_of_a_layer(target, report):
    """The counted number is the limit, so that a lost fusion shows."""
    for name, (one, three) in LAUNCHES[target].items():
        *_, first, last, middle = report["steps"][name]["launches"]
        assert max(first, last) <= one and middle <= three, (name, first, middle, last)
