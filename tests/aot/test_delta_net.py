"""The gated delta net at the shapes of Qwen3.5-35B-A3B, compiled: states are aliased, or temporaries would hold a copy;
temporaries are activations; and kernels keep to their registers and bundles."""

import pytest

from support.aot import delta_net, ptx

# Instructions of the whole kernels, a tenth above what was compiled for an H200, an A100 and an L4.
GPU_CEILINGS = {"delta_net": 790, "delta_net_chunks": 3400, "delta_net_within_chunks": 3750}
# Bundles of the whole kernel, for a v5e, a v6e and a v5p: for 8 heads at decode, whose memories take 1,920, 1,120 and 1,330
# cycles of HBM; and both ways of an item, its walk once.
TPU_CEILINGS = {"delta net, decode": (1670, 1300, 1720), "delta net, mixed": (25000, 24200, 24800)}
TPUS = ("v5e", "v6e", "v5p")


@pytest.mark.parametrize(("target", "batch"), [("h200", "decode"), ("h200", "mixed"), ("a100-40g", "mixed"), ("l4", "mixed")])
def test_gpu(target, batch):
    kernels, temporaries = ptx.measure(target, delta_net.step, *delta_net.arguments(batch), donate_argnums=0)
    assert temporaries <= delta_net.room(batch)
    ptx.need_kernels()
    found = {name: kernel for name, kernel in kernels.items() if name.startswith("delta_net")}
    assert set(found) == ({"delta_net"} if batch == "decode" else {"delta_net_chunks", "delta_net_within_chunks"})
    for name, kernel in found.items():
        assert kernel.instructions <= GPU_CEILINGS[name], kernel


@pytest.mark.parametrize("target", TPUS)
def test_tpu(target, compiled_by):
    report = compiled_by("tpu_kernels", target)
    for case, ceilings in TPU_CEILINGS.items():
        copy = delta_net.TAIL_BYTES if target == "v5p" else 0  # which has another layout for them
        assert report[case]["temp_bytes"] <= delta_net.room(case.split()[-1]) + copy
        ((name, kernel),) = report[case]["kernels"].items()
        assert name.startswith("delta_net") and 0 < kernel["bundles"] <= ceilings[TPUS.index(target)], (case, kernel)
