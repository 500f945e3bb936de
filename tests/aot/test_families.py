"""Steps of Qwen3.6-35B-A3B and gpt-oss-20b, compiled for a GPU and a TPU: caches and states are aliased, temporaries are
activations, and which kernels serve them."""

import pytest

from pallas_kernels import aot

pytestmark = pytest.mark.timeout(1800)  # the first test of a target compiles its steps

# What the kernels of TPUs do not have yet, so that XLA computes it: attention with sinks, or with heads that are not of 128. It
# copies a pool of pages for that. (Of gpt-oss, whose step there takes 0.6 GB of temporaries, only aliasing is asserted.)
XLA_ON_TPU = {"paged_attention"}
TARGETS = ("h200", "v5e")


@pytest.fixture
def report(target, compiled_by):
    return compiled_by("families", target)


@pytest.mark.parametrize("target", TARGETS)
def test_caches_and_states_are_aliased_and_no_weights_copied(target, report):
    for name, step in report.items():
        assert step["alias_bytes"] >= step["cache_bytes"], name
        room = 4 * step["numbers"] + (4 << 20) + (step["page_bytes"] if target == "v5e" else 0)
        if (target, name.split(",")[0]) != ("v5e", "gpt-oss:20b"):
            assert step["temp_bytes"] <= room, (name, step["temp_bytes"] / 2**20, room / 2**20)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_are_taken(target, report):
    kernels = {"gpu": "triton", "tpu": "mosaic_tpu"}[aot.TARGETS[target].target.platform]
    for name, step in report.items():
        xla = XLA_ON_TPU if kernels == "mosaic_tpu" else set()
        for operation, format, backend in step["choices"]:
            if operation in ("expert_ffn", "paged_attention", "delta_net"):
                assert backend == kernels or operation in xla, (name, operation, format, backend)
        assert "delta_net" in {operation for operation, *_ in step["choices"]} or "gpt-oss" in name
