"""`plan` with the real compilers: a small model for three targets, Qwen3-30B-A3B at real shapes from its header alone.

Each target is compiled in a separate process, as the command does.
"""

import json
import re

import pytest

from ferrum_jax import headers, plan
from ferrum_jax.cli import main
from pallas_kernels import aot
from support.tiny_gguf import write_tiny_llama

GIB = 1 << 30


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A small model's file, cut off after its header."""
    path = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", hidden=256, head_dim=64, ffn=512, context=2048)
    path.write_bytes(path.read_bytes()[:4096])
    return path


def test_small_model_for_three_targets(cut, capsys):
    assert main(["plan", str(cut), "--target", "t4,l4,v5e", "--context", "512", "--batch", "4", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["targets"]:
        kv = 4 * 512 * 2 * 2 * 2 * 64 * 2  # rows, tokens, layers, keys and values, heads, head_dim, 2 bytes
        assert row["fits"] and row["kv_bytes"] == kv and row["limit_bytes"] > 11 * GIB
        assert 0 < row["temporaries_bytes"] < 64 << 20
        assert row["largest_context"] == 2048 and row["largest_batch"] > 1000
        assert all(seconds > 0 for seconds in row["compile_s"].values()) and set(row["compile_s"]) == {"prefill", "decode"}
        assert row["dtype"] == ("float16" if row["target"] == "t4" else "bfloat16")
        operations = {backend["operation"] for backend in row["backends"]}
        assert {"quantized_matmul", "paged_attention"} <= operations
        assert {backend["target"] for backend in row["backends"]} == {str(aot.TARGETS[row["target"]].target)}


def test_what_a_tpu_cannot_hold_is_no_crash(cut):
    """More rows than fit: the compiler refuses, and the answer is its count."""
    found = plan.plan_for(plan.find_header(str(cut)), plan.Case("v5e", 2048, 20_000), 300)
    assert found.error == "" and found.fits is False
    assert found.limit < found.total and found.kv > found.limit
    assert 0 < found.largest_batch < 20_000


def test_qwen3_30b_from_its_header(target="h200"):
    header = headers.bundled("qwen3:30b-a3b")
    found = plan.plan_for(header, plan.Case(target, 8192, 8), 600)
    file = sum(tensor.nbytes for tensor in header.tensors.values())
    assert found.error == "" and found.fits and found.weights <= 1.05 * file
    assert found.kv == 8 * 8192 * 96 * 1024
    # No dequantized layer (1.2 GB in 16 bits), no product of every expert (2 GiB), no copy of the cache (6 GiB).
    assert found.temporaries <= 512 << 20
    assert found.total == found.weights + found.kv + found.temporaries
    room = (found.limit - found.weights) // (8192 * 96 * 1024)
    assert 0.9 * room - 1 <= found.largest_batch <= room
    assert found.largest_context == 40_960
    bound = aot.TARGETS[target].memory_bandwidth * 8 / found.read_bytes
    assert found.tokens_per_s == pytest.approx(bound) and 700 <= bound <= 3000


@pytest.mark.slow
def test_fine_tuning_of_qwen3_30b():
    """A step of 4 x 2,048 tokens, compiled with one layer. Each further one keeps its residual stream, and copies of its
    adapter; with all 48 the compiler counted 1.6 GB of temporaries on an L4 (attention), and 5.8 GB on an H100 (all)."""
    header = headers.bundled("qwen3:30b-a3b")
    short = headers.from_json(headers.to_json(header), header.path)
    short.metadata["qwen3moe.block_count"] = 1
    short.tensors = {name: tensor for name, tensor in short.tensors.items() if not re.match(r"blk\.[1-9]", name)}
    found = plan.compute(short, plan.Case("l4", 2048, 4, finetune={}))
    assert found.temporaries <= 1.5 * GIB  # no logits of a pack (1.2 GB), no dequantized experts (2.3 GiB)
    weights = sum(tensor.nbytes for tensor in header.tensors.values())
    attention = 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512)) * 4
    for adapter, memory in ((48 * found.adapter, aot.GPUS["h100"].memory), (attention, aot.GPUS["l4"].memory)):
        kept = 47 * 2048 * 2048 * 4 + 4 * adapter
        assert 1.05 * weights + 3 * adapter + found.temporaries + kept <= 0.97 * memory
