"""The GPU benchmark without a GPU: its parent, its arithmetic, and sections of it at small shapes.

`python -m benchmarks.gpu --rehearse` runs all of them and compiles every program for the device; this file tests the quick
parts, and those that show only when something goes wrong.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import make_synthetic, report, tensors
from benchmarks.gpu import check_kernels, kernels, run, starts, trace, weights, whole
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sizes import GOALS, REAL, SMALL, goal
from ferrum_jax import functional
from ferrum_jax.quantized import QuantizedTensor
from pallas_kernels import aot
from pallas_kernels.blocks import FORMATS
from support import ROOT


def test_model_is_the_one_that_make_synthetic_writes():
    name = "qwen3-30b-a3b"
    listed = tensors.tensors(make_synthetic.SHAPES[name])
    ours = tensors.tensors(REAL.config)
    assert sorted((t.name, t.format, t.shape) for t in ours) == sorted((t.name, t.format, t.shape) for t in listed)
    nbytes = sum(FORMATS[t.format].row_bytes(t.shape[-1]) * int(np.prod(t.shape[:-1])) for t in ours)
    assert 17e9 < nbytes < 19.5e9  # a file of this model is 18.6 GB


@pytest.mark.slow
def test_weights_are_made_with_the_deviation_that_was_asked_for():
    params = weights.make(Lab(SMALL, jax.devices()[0]), SMALL.config)
    layers = params["layers"]
    down = layers["feed_forward"]["expert_down"]
    assert down.formats == ("Q4_K", "Q4_K", "Q6_K")
    for tensor, std in ((params["unembedding"], 0.03), (down.stacks["Q6_K"], 0.01), (params["embedding"], 1.0)):
        assert isinstance(tensor, QuantizedTensor)
        matrix = tensor.operand(*([0] * (len(tensor.shape) - 2)))
        values = check_kernels.reference_weights(np.asarray(matrix.planes[0]), tensor.format)
        assert 0.5 * std <= values.std() <= 2 * std
        assert abs(values.mean()) <= 0.1 * std
    router = np.asarray(layers["feed_forward"]["router"].stacks["F32"].planes[0])
    assert router.shape == (3, 8, 256) and 0.025 <= router.std() <= 0.035


@pytest.mark.slow
def test_a_collecting_lab_runs_nothing_and_knows_every_program():
    lab = Lab(REAL, None, aot.TARGETS["h200"].target)
    decoding = whole.Decoding(lab, starts_params(lab), REAL.config, 32)
    sampled = decoding.step()
    assert sampled.tokens.shape == (32, REAL.steps)
    decoding.step()
    programs = [program for program, _ in lab.collected.values()]
    assert [program.function for program in programs] == [whole.filled_cache, functional.advance]
    assert programs[1].donate == (1,)
    arguments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs[1].args))
    assert 24e9 < arguments < 27e9  # 18.6 GB of weights and 32 x 2,112 tokens of 96 KiB
    labels = [label for label, *_ in starts.programs(lab)]
    assert labels == ["decode 1", "decode 8", "decode 32", "prefill 64", "prefill 512"]


def starts_params(lab):
    return next(starts.programs(lab))[2][0]


def test_compiler_options_hold_inside_the_block_alone():
    lab = Lab(SMALL, None, aot.TARGETS["h200"].target)
    lab.run(kernels.product, np.ones((4, 4), np.float32))
    with lab.options(xla_gpu_enable_command_buffer="FUSION"):
        lab.run(kernels.product, np.ones((4, 4), np.float32))
    lab.run(kernels.product, np.ones((4, 4), np.float32))
    assert [program.options for program, _ in lab.collected.values()] == [{}, {"xla_gpu_enable_command_buffer": "FUSION"}]


@pytest.mark.slow
def test_small_kernels_section_gives_rows_with_their_checks(monkeypatch):
    lab = Lab(SMALL, jax.devices()[0], rehearsal=True)
    wanted = ("ceilings", "experts 1", "attention 4 bfloat16", "qkv 1")
    rows = [row for name, step in kernels.steps(lab) if name in wanted for row in step()]
    assert len(rows) == 6
    for row in rows[3:]:
        assert row["check"]["ok"] and row["unit"] == "of copy bandwidth" and row["read_bytes"] > 0
    assert rows[3]["experts_touched"] == 2.0
    config = SMALL.config
    one = 3 * config.hidden_size * config.expert_intermediate_size * 9 // 16  # 4.5 bits per weight
    assert rows[3]["read_bytes"] == 2 * one


def test_a_wrong_result_is_called_wrong():
    lab = Lab(SMALL, jax.devices()[0])
    want = np.random.default_rng(0).standard_normal((8, 64))
    good = [want.astype(np.float32)]

    def ok(first, second, bound=0.01, backends="triton"):
        return check_kernels.compare(lab, "case", (first, second), [want], bound, backends)["ok"]

    assert ok(good, good)
    for change in (np.nan, 0.5, np.inf):
        bad = good[0].copy()
        bad[3, 5] = change + (0 if np.isnan(change) else bad[3, 5])
        assert not ok([bad], [bad])
    other = good[0].copy()
    other[0, 0] += 1e-5
    assert not ok(good, [other])  # a moving error
    on_gpu = SimpleNamespace(has_kernels=True)
    assert not check_kernels.compare(on_gpu, "case", (good, good), [want], 0.01, "xla")["ok"]


def events(*parts):
    return [SimpleNamespace(name=name, duration_ns=duration) for name, duration in parts]


def test_profile_counts_what_streams_did():
    stream = SimpleNamespace(
        name="Stream #13(Compute)", events=events(("matmul", 3000.0), ("matmul_1", 5000.0), ("loop_add_fusion_2", 1000.0))
    )
    copies = SimpleNamespace(name="Stream #14(MemcpyD2D)", events=events(("MemcpyD2D", 500.0)))
    derived = SimpleNamespace(name="XLA Ops", events=events(("matmul", 9000.0)))
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[stream, copies, derived])
    host = SimpleNamespace(name="/host:CPU", lines=[stream])
    found = trace.kernels([host, gpu])
    assert [(kernel.name, kernel.count) for kernel in found] == [("matmul", 2), ("loop_add_fusion", 1), ("MemcpyD2D", 1)]
    summary = trace.summary(found, steps=2, step_s=1e-5)
    assert summary["launches"] == 2 and summary["copies"] == 0.5
    assert summary["kernel_ms"] == pytest.approx(0.00475, abs=1e-4) and summary["idle_ms"] > 0
    assert trace.summary([], 2, 1e-5) == {}


def test_profiles_of_this_version_of_jax_can_be_read():
    """In a separate process: once compilers for absent devices are loaded, taking a profile can crash the process."""
    script = "import jax\nfrom benchmarks.gpu import trace\nassert trace.profile(lambda: jax.numpy.ones(8) + 1) == []"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)


def test_own_kernels_are_found_in_a_compiled_program():
    text = 'custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 1 : i32, ir = "x", name = "expert_down"}'
    assert kernels.own_kernels(text) == {"expert_down"}


def child(monkeypatch, tmp_path, body):
    """A section whose process runs `body`."""
    (tmp_path / "pretended.py").write_text(
        "import json, os, sys\nsay = lambda **e: print('@' + json.dumps(e), flush=True)\n" + body
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    real = run.run_child

    def pretended(command, *rest):
        return real(["pretended", *command[1:]], *rest)

    monkeypatch.setattr(run, "run_child", pretended)
    return run.Section("pretended", "pretended", 30)


HELLO = "say(hello={'device': {'name': 'NVIDIA H200'}, 'versions': {}, 'backend': 'b'})\n"


def test_a_section_goes_on_after_a_process_that_died(monkeypatch, tmp_path):
    body = HELLO + (
        "skip = json.loads(sys.argv[sys.argv.index('--skip') + 1])\n"
        "for name in ('a', 'b', 'c'):\n"
        "    if name in skip: continue\n"
        "    say(begin=name)\n"
        "    if name == 'b': print('illegal address', file=sys.stderr); os._exit(3)\n"
        "    say(row={'name': name, 'ok': name != 'c'})\n"
    )
    outcome = run.run_section(child(monkeypatch, tmp_path, body), "measure", 30, lambda text: None)
    assert [row["name"] for row in outcome.rows] == ["a", "c"]
    assert outcome.failures == [{"step": "b", "error": "exit code 3: illegal address"}]
    assert outcome.wrong() == ["c"]


def test_a_section_that_hangs_is_ended_and_keeps_its_rows(monkeypatch, tmp_path):
    body = "import time\nsay(begin='a')\nsay(row={'name': 'a'})\nsay(begin='b')\ntime.sleep(60)\n"
    outcome = run.run_section(child(monkeypatch, tmp_path, body), "measure", 2.0, lambda text: None)
    assert [row["name"] for row in outcome.rows] == ["a"]
    assert outcome.failures == [{"step": "b", "error": "out of time"}] and outcome.seconds < 10


def test_results_are_written_after_every_section_and_rendered(monkeypatch, tmp_path):
    body = HELLO + (
        "say(row={'name': 'decode, batch 1', 'value': 700.0, 'unit': 'tokens/s', 'floor': 2400, 'must': 600, 'aim': 1200,\n"
        "  'context': 1024, 'check': {'ok': True}})\n"
        "say(row={'name': 'profile of decode, batch 1', 'of': 'step', 'launches': 480.0, 'kernel_ms': 1.0, 'idle_ms': 0.4,\n"
        "  'top': [{'kernel': 'expert_down', 'launches': 48.0, 'ms': 0.3}]})\n"
    )
    section = child(monkeypatch, tmp_path, body)
    late = run.Section("late", "late", 1e6)
    monkeypatch.setattr(run, "SECTIONS", (section, late))
    out = tmp_path / "results"
    assert run.measure(out, [], limit=60) == 0
    result = json.loads((out / "gpu-h200.json").read_text())
    assert "were left" in result["sections"]["late"]["skipped"]
    result["versions"] |= {"jax": "0.11.2"}
    page = "\n".join(report.gpu([result]))
    assert "| decode, batch 1 | 700 | tokens/s | 2,400 | 600 | 1,200 | held |" in page
    assert "| decode, batch 1 | 480 | 1.000 | 0.400 | expert_down 0.300 ms |" in page
    assert "all held" in page


def test_goals_are_the_issue_s_and_small_shapes_have_none():
    assert goal("decode, batch 1", 700.0, REAL) | {"value": 0} == {
        "value": 0, "unit": "tokens/s", "floor": 2400, "must": 600, "aim": 1200, "must_met": True,
    }  # fmt: skip
    assert not GOALS["cold compile"].row(121.0)["must_met"] and GOALS["cold compile"].row(119.0)["must_met"]
    assert goal("prefill", 1.0, SMALL) == {"value": 1.0, "unit": "tokens/s"}
    assert run.slug("NVIDIA H200") == "h200"
