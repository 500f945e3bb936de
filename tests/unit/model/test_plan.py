"""Planning and the count of memory: headers without weights, and the arithmetic.

No compiler for a device runs here: it is replaced by one whose temporaries are known. tests/aot has the real ones.
"""

import json
import math
import random
import types
from pathlib import Path

import jax
import pytest

from benchmarks import make_synthetic
from benchmarks.tensors import tensors as synthetic_tensors
from ferrum_jax import headers, loading, memory, plan
from ferrum_jax.cli import main
from ferrum_jax.distributed import Placement
from ferrum_jax.errors import ModelFileError, ModelNotFoundError
from ferrum_jax.hub import huggingface
from ferrum_jax.state import new_cache, recurrent_kinds
from ferrum_jax.weights.gguf import open_gguf
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels import aot
from pallas_kernels.dispatch import Target
from support.hub_server import serve
from support.random_models import DENSE
from support.tiny_gguf import write_tiny_llama

GIB = 1 << 30
QWEN = "qwen3:30b-a3b"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=4096)


@pytest.fixture(scope="module")
def cut(path):
    """The same file, cut off after its header."""
    with open_gguf(path) as file:
        end = min(tensor.offset for tensor in file.tensors.values())
    short = path.with_name("cut.gguf")
    short.write_bytes(path.read_bytes()[:end])
    return short


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(aot, "missing", lambda name: None)


# Headers


def test_a_file_without_weights_opens_for_its_header_only(path, cut):
    with open_gguf(path) as whole, open_gguf(cut, header_only=True) as short:
        assert short.metadata.keys() == whole.metadata.keys()
        places = [[(t.name, t.format, t.shape, t.offset, t.nbytes) for t in file.tensors.values()] for file in (whole, short)]
        assert places[0] == places[1]
        with pytest.raises(ModelFileError, match=r"ends inside tensor 'token_embd\.weight'"):
            short.read(short.tensors["token_embd.weight"])
    for refused in (lambda: open_gguf(cut), lambda: loading.load(cut), lambda: loading.validate(cut)):
        with pytest.raises(ModelFileError, match="truncated"):
            refused()


def test_a_file_cut_off_inside_its_header_is_refused(cut, tmp_path, capsys):
    inside = tmp_path / "inside.gguf"
    inside.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(ModelFileError, match="truncated"):
        open_gguf(inside, header_only=True)
    assert main(["plan", str(inside), "--target", "l4"]) == 2
    assert "truncated" in capsys.readouterr().err


def test_a_header_survives_json(path):
    with open_gguf(path) as file:
        read = headers.from_json(headers.to_json(file), Path("elsewhere.gguf"))
        config = file.config()
        assert read.config() == config
        cpu = Placement.abstract(Target("cpu"))
        trees = [abstract_parameters(parameters(header, config), cpu) for header in (file, read)]
        assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    with pytest.raises(ModelFileError, match=r"elsewhere\.gguf: only the header is here"):
        read.read(read.tensors["token_embd.weight"])


def test_bundled_header_is_that_of_a_full_file():
    """Types and shapes as the benchmark's own recipe has them; llama.cpp said those of the header."""
    header = headers.bundled(QWEN)
    tensors = synthetic_tensors(make_synthetic.SHAPES["qwen3-30b-a3b"])
    expected = {tensor.name: (tensor.format, tensor.shape, tensor.nbytes) for tensor in tensors}
    assert {t.name: (t.format, t.shape, t.nbytes) for t in header.tensors.values()} == expected
    config = header.config()
    parameters(header, config)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (48, 2048, 32, 4)
    assert (config.num_experts, config.experts_per_token, config.expert_intermediate_size) == (128, 8, 768)
    assert (config.head_dim, config.vocab_size, config.context_length) == (128, 151_936, 40_960)
    assert config.rope_theta == 1e6 and config.rms_norm_eps == pytest.approx(1e-6)
    assert sum(math.prod(t.shape) for t in header.tensors.values()) == 30_532_122_624
    assert headers.bundled("Qwen3:30B") is not None and headers.bundled("qwen3:8b") is None


# How many numbers the published models have; llama.cpp states the same counts when it loads them.
PUBLISHED = {
    "qwen3.5:0.8b": 752_393_024,
    "qwen3.5:2b": 1_881_825_088,
    "qwen3.5:4b": 4_205_751_296,
    "qwen3.5:9b": 8_953_803_264,
    "qwen3.6:27b": 26_895_998_464,
    "qwen3.6:35b-a3b": 34_660_610_688,
    "gpt-oss:20b": 20_914_757_184,
}


@pytest.mark.parametrize("alias", PUBLISHED)
def test_bundled_headers_are_those_of_published_models(alias):
    header = headers.bundled(alias)
    config = header.config()
    parameters(header, config)
    assert sum(math.prod(t.shape) for t in header.tensors.values()) == PUBLISHED[alias]
    formats = {t.format for name, t in header.tensors.items() if name.endswith("_exps.weight")}
    if alias == "gpt-oss:20b":
        sizes = config.num_layers, config.num_heads, config.num_kv_heads, config.num_experts, config.experts_per_token
        assert sizes == (24, 64, 8, 32, 4) and formats == {"MXFP4"} and config.by_layer("sliding_window") == (128, 0) * 12
        assert sum(t.nbytes for t in header.tensors.values()) == pytest.approx(12.1e9, rel=0.01)  # the size of the file
    else:
        (kind,) = recurrent_kinds(config)
        assert len(kind.layers) == 3 * len(config.attentions) == config.num_layers * 3 // 4
        assert config.context_length == 262_144 and config.vocab_size == 248_320
    assert headers.bundled("qwen3.6") is not None and headers.bundled("gpt-oss") is not None


def _latent(hidden: int, heads: int, nope: int, values: int, query: int) -> int:
    """The numbers of a layer's norms and of its attention over vectors of 512 and keys of 64."""
    queries = query * (hidden + 1) + heads * (nope + 64) * query if query else heads * (nope + 64) * hidden
    return queries + (512 + 64) * hidden + 512 + heads * (nope + values) * 512 + hidden * heads * values + 2 * hidden


def _gemma3(layers: int, hidden: int, width: int, heads: int, kv_heads: int, head: int) -> int:
    layer = (2 * heads + 2 * kv_heads) * head * hidden + 2 * head + 4 * hidden + 3 * width * hidden
    return layers * layer + (262144 + 1) * hidden


def _gemma4(layers: int, full: int, hidden: int, width: int, heads: int, kv_heads: int, full_kv: int) -> int:
    """In layers without a window values are keys; and the 256 frequencies of these."""
    sliding = (2 * heads + 2 * kv_heads) * 256 * hidden + 2 * 256
    whole = (2 * heads + full_kv) * 512 * hidden + 2 * 512
    same = 3 * width * hidden + 4 * hidden + 1
    return layers * same + (layers - full) * sliding + full * whole + (262144 + 1) * hidden + 256


def _lfm2(attends: int, recurs: int) -> int:
    attention = 2 * 2048 * 2048 + 2 * 512 * 2048 + 2 * 64
    return attends * attention + recurs * (4 * 2048 * 2048 + 3 * 2048) + (attends + recurs) * 2 * 2048 + (65536 + 1) * 2048


def _by_hand() -> dict[str, int]:
    """How many numbers models have, from the sizes that their publishers state; where these count them, they agree (DeepSeek's
    15.7e9, LFM2's 1.17e9 and 8.34e9, Gemma's 3.88e9, 27.0e9, 25.2e9 and 30.7e9)."""
    air = 2 * 96 * 128 * 4096 + 2 * 8 * 128 * 4096 + (96 + 8 + 8) * 128 + 2 * 4096
    air_experts = (128 + 1) * 3 * 1408 * 4096 + 128 * 4096 + 128
    flash_experts, lite_experts = (64 + 1) * 3 * 1536 * 2048 + 64 * 2048 + 64, (64 + 2) * 3 * 1408 * 2048 + 64 * 2048
    gemma_experts = 128 * 3 * 704 * 2816 + 129 * 2816 + 128 + 3 * 2816
    lfm_experts = 32 * 3 * 1792 * 2048 + 32 * 2048 + 32
    return {
        "glm4.5:air": 46 * air + 45 * air_experts + 3 * 10944 * 4096 + (2 * 151552 + 1) * 4096,
        "glm4.7:flash": 47 * _latent(2048, 20, 192, 256, 768) + 46 * flash_experts + 3 * 10240 * 2048 + (2 * 154880 + 1) * 2048,
        "deepseek-v2:lite": 27 * _latent(2048, 16, 128, 128, 0) + 26 * lite_experts + (3 * 10944 + 2 * 102400 + 1) * 2048,
        "gemma3:4b": _gemma3(34, 2560, 10240, 8, 4, 256),
        "gemma3:12b": _gemma3(48, 3840, 15360, 16, 8, 256),
        "gemma3:27b": _gemma3(62, 5376, 21504, 32, 16, 128),
        "gemma4:26b-a4b": _gemma4(30, 5, 2816, 2112, 16, 8, 2) + 30 * gemma_experts,
        "gemma4:31b": _gemma4(60, 10, 5376, 21504, 32, 16, 4),
        "lfm2:1.2b": _lfm2(6, 10) + 16 * 3 * 8192 * 2048,
        "lfm2:8b-a1b": _lfm2(6, 18) + 2 * 3 * 7168 * 2048 + 22 * lfm_experts,
    }


@pytest.mark.parametrize(("alias", "count"), _by_hand().items())
def test_bundled_headers_have_the_numbers_counted_by_hand(alias, count):
    header = headers.bundled(alias)
    parameters(header, header.config())
    assert sum(math.prod(t.shape) for t in header.tensors.values()) == count
    for tensor in header.tensors.values():  # llama.cpp's rules for rows that its blocks do not fit
        assert tensor.shape[-1] % 256 == 0 or tensor.format in ("F32", "Q5_0", "Q8_0"), tensor


def test_bytes_of_bundled_headers_counted_by_hand():
    """Of a layer's experts, of the states and of what a token caches."""
    tensors = headers.bundled("gemma4:26b").tensors
    found = sum(tensors[f"blk.1.ffn_{name}_exps.weight"].nbytes for name in ("gate", "up", "down"))
    assert found == 128 * (2 * 704 * 2816 * 144 // 256 + 2816 * 704 * 34 // 32)
    air = sum(tensor.nbytes for tensor in headers.bundled("glm4.5").tensors.values())
    assert air == pytest.approx(68e9, rel=0.05)
    assert headers.bundled("glm4.7").config().kv_bytes_per_token(2) == 47 * (512 + 64) * 2
    assert headers.bundled("gemma3:27b").config().kv_bytes_per_token(2) == 62 * 2 * 16 * 128 * 2
    lfm2 = headers.bundled("lfm2:8b-a1b").config()
    assert lfm2.bytes_per_state == 18 * 2 * 2048 * 4 and lfm2.kv_bytes_per_token(2) == 6 * 2 * 8 * 64 * 2
    small = headers.bundled("gemma4").config()  # the last 18 of 42 layers read the keys of others
    assert small.kv_bytes_per_token(2) == 2 * 2 * 2 * (20 * 256 + 4 * 512) and small.layers[0].input_width == 256
    double = headers.bundled("gemma4:e2b").config().by_layer("intermediate_size")
    assert double == (6144,) * 15 + (12288,) * 20


def test_header_of_a_file_at_hand_or_of_the_package(cut):
    remarks = []
    assert plan.find_header(str(cut)).path == cut
    assert plan.find_header(QWEN, lambda *remark: remarks.append(remark[2])).path.suffix == ".json"
    assert "its header in the ferrum_jax package" in remarks[0]
    with pytest.raises(ModelNotFoundError, match="is not a file, a directory or an alias"):
        plan.find_header("nonsense")


def test_only_the_header_is_fetched_from_the_hub(path, monkeypatch, tmp_path):
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface, "_HEADS", (1000, 1 << 20))  # the first is too little
        hub.repos["someone/Tiny-GGUF"] = {"tiny.Q8_0.gguf": path.read_bytes() + bytes(32 << 20)}
        hub.drop_after = [2 << 20]
        header = plan.find_header("someone/Tiny-GGUF")
        assert header.path == Path("tiny.Q8_0.gguf") and len(hub.bodies()) == 1
        assert header.config() == plan.find_header(str(path)).config()
        assert not (tmp_path / "cache").exists()
        hub.repos["someone/Tiny-GGUF"] = {"tiny.Q8_0.gguf": path.read_bytes()[:1500]}
        with pytest.raises(ModelFileError, match="remain in the file"):
            plan.find_header("someone/Tiny-GGUF")
        with pytest.raises(ModelNotFoundError, match="no repository"):
            plan.find_header("someone/else")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelNotFoundError, match="offline"):
            plan.find_header("someone/Tiny-GGUF")


# The arithmetic


def compiler(temporaries, *, refuses=None):
    """A stand-in of aot.compile_for: a step takes temporaries(rows, tokens of the cache) bytes in addition to its inputs and
    outputs; a program that needs more than `refuses` bytes is refused, as by the TPU compiler."""

    def compile_for(name, function, params, cache, first, *rest, donate_argnums, compiler_options):
        arguments = memory.nbytes((params, cache, first, *rest))
        batch = jax.tree.leaves(first)[0].shape[0]
        temp = int(temporaries(batch, cache.num_pages * cache.page_size))
        if refuses is not None and arguments + temp > refuses:
            needed = (arguments + temp) / GIB
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
                f"temporaries ({needed:.2f}G) exceeds available HBM ({refuses / GIB:.2f}G). HLO module: jit__lambda."
            )
        donated = memory.nbytes([(params, cache, first)[i] for i in donate_argnums])
        sizes = types.SimpleNamespace(
            temp_size_in_bytes=temp,
            argument_size_in_bytes=arguments,
            output_size_in_bytes=donated,
            alias_size_in_bytes=donated,
        )
        return types.SimpleNamespace(memory_analysis=lambda: sizes)

    return compile_for


def test_count_of_qwen3_30b_on_h200(monkeypatch):
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: 100 << 20))
    header = headers.bundled(QWEN)
    found = plan.compute(header, plan.Case("h200", 8192, 8))
    file = sum(tensor.nbytes for tensor in header.tensors.values())
    assert file <= found.weights <= 1.05 * file
    assert found.kv == 8 * 8192 * 96 * 1024 and found.dtype == found.kv_dtype == "bfloat16"
    assert 100 << 20 <= found.temporaries <= 110 << 20  # and the slots, 8 bytes an id of the vocabulary and row
    assert found.total == found.weights + found.kv + found.temporaries and found.fits
    assert found.limit == int(0.75 * 139 * GIB) and "XLA_CLIENT_MEM_FRACTION" in found.limit_counted
    row = 8192 * 96 * 1024
    expected = (found.limit - found.weights - found.temporaries) / row
    assert expected - 3 <= found.largest_batch <= expected
    assert found.largest_context == 40_960 == header.metadata["qwen3moe.context_length"]
    assert set(found.compile_s) == {"prefill", "decode"} and not found.error and not found.help


def test_states_are_counted(monkeypatch):
    """Qwen3.6-35B-A3B: 10 layers attend, 30 recur; a row has a state and may leave a checkpoint. gpt-oss: pages of the layers
    with a window are few."""
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: 100 << 20))
    found = plan.compute(headers.bundled("qwen3.6:35b-a3b"), plan.Case("h200", 8192, 8))
    state = 30 * 4 * (32 * 128 * 128 + 3 * (2 * 16 + 32) * 128)
    assert found.kv == 8 * 8192 * 10 * 2 * 2 * 256 * 2 and found.states == 2 * 8 * state and found.fits
    assert found.total == found.weights + found.kv + found.states + found.temporaries
    expected = (found.limit - found.weights - found.temporaries) / (found.kv / 8 + 2 * state)
    assert 0.9 * expected <= found.largest_batch <= expected  # a row also has counts for 248,320 ids
    found = plan.compute(headers.bundled("gpt-oss:20b"), plan.Case("h200", 8192, 8))
    page = 12 * 16 * 2 * 8 * 64 * 2  # of the layers of one kind
    assert found.kv == 8 * page * (8192 // 16 + 42) and found.states == 0


def test_what_a_decode_step_reads():
    """The arithmetic of the headline: 1.85 GB at one row, 110 of 128 experts at 32 rows; against the file's own table."""
    header = headers.bundled(QWEN)
    config = header.config()
    params = abstract_parameters(parameters(header, config), Placement.of())
    experts = sum(t.nbytes for t in header.tensors.values() if "_exps." in t.name)
    embedding = header.tensors["token_embd.weight"].nbytes
    others = sum(t.nbytes for t in header.tensors.values()) - experts - embedding
    for batch, touched in ((1, 8.0), (32, 111.77), (4096, 128.0)):
        share, count = plan.experts_read(config, batch)
        assert count == pytest.approx(touched, abs=0.01)
        read = plan.weights_read(params, config, batch, share)
        assert read == pytest.approx(others + experts * share + embedding * batch / config.vocab_size, abs=2)
    share, _ = plan.experts_read(config, 1)
    assert 1.80e9 <= plan.weights_read(params, config, 1, share) <= 1.95e9
    tied = {name: leaf for name, leaf in params.items() if name != "unembedding"}
    assert plan.weights_read(tied, config, 1, 0.0) >= embedding
    assert plan.experts_read(DENSE, 5) == (1.0, None)


def test_bound_in_tokens_per_second(monkeypatch):
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: 0))
    found = plan.compute(headers.bundled(QWEN), plan.Case("h200", 1024, 1))
    assert 2300 <= found.tokens_per_s <= 2500
    assert found.tokens_per_s == pytest.approx(4.8e12 / found.read_bytes)


@pytest.mark.slow
def test_largest_batch_and_context_fit_and_one_more_does_not(path, monkeypatch):
    """Against plans for the answer itself and for a tenth more, whatever temporaries grow with."""
    header = plan.find_header(str(path))
    for fixed, a_row, a_token in ((0, 0, 0), (8 << 20, 1 << 18, 0), (1 << 20, 0, 512), (0, 1 << 20, 3000)):
        monkeypatch.setattr(aot, "compile_for", compiler(lambda b, t, f=fixed, r=a_row, k=a_token: f + r * b + k * t))
        for target, batch in (("t4", 4), ("v5e", 1), ("t4", 60_000)):
            found = plan.compute(header, plan.Case(target, 4096, batch))
            assert found.fits == (found.largest_batch >= batch) == (found.largest_context >= 4096)
            best = found.largest_batch
            assert best > 0 and plan.compute(header, plan.Case(target, 4096, best)).fits
            assert not plan.compute(header, plan.Case(target, 4096, best + best // 10 + 1)).fits
            if not found.fits and found.largest_context:
                assert plan.compute(header, plan.Case(target, found.largest_context, batch)).fits


def test_refusal_of_the_compiler_is_an_answer(path, monkeypatch):
    limit = aot.TPUS["v5e"].memory
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: tokens * 2000, refuses=limit))
    header = plan.find_header(str(path))
    found = plan.compute(header, plan.Case("v5e", 4096, 4000))
    assert not found.fits and not found.error and found.limit == limit
    assert found.total == pytest.approx(found.weights + found.kv + 4000 * 4096 * 2000, rel=0.01)
    assert 0 < found.largest_batch < 4000
    assert plan.compute(header, plan.Case("v5e", 4096, found.largest_batch)).fits
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.48G hbm."
    assert plan._refused(other, 1) == int(17.505 * GIB) and plan._refused("RESOURCE_EXHAUSTED", 5) == 6


def test_weights_that_do_not_fit_leave_no_batch(monkeypatch):
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: 1))
    found = plan.compute(headers.bundled(QWEN), plan.Case("l4", 1024, 1))
    assert not found.fits and found.largest_batch == found.largest_context == 0
    assert "XLA_CLIENT_MEM_FRACTION=0." in found.help
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    assert plan.compute(headers.bundled(QWEN), plan.Case("l4", 1024, 1)).fits
    assert plan.compute(headers.bundled(QWEN), plan.Case("t4", 1024, 1)).help == ""


def test_dtypes_of_a_target():
    header = headers.bundled(QWEN)
    expected = {"t4": "float16", "a100-40g": "bfloat16", "v5e": "bfloat16"}
    for target, dtype in expected.items():
        config, kv_dtype = plan.configure(header, plan.Case(target, 16, 1))
        assert (config.dtype, kv_dtype) == (dtype, dtype)
    config, kv_dtype = plan.configure(header, plan.Case("t4", 16, 1, "float32", "fp8"))
    assert (config.dtype, kv_dtype) == ("float32", "fp8")


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_kv_bytes_are_those_of_the_cache(kv_dtype):
    cache = new_cache(DENSE, num_pages=7, dtype=kv_dtype)
    for kind in ("cpu", "gpu", "tpu"):
        there = Placement.abstract(Target(kind))
        assert memory.nbytes(memory.abstract_state(DENSE, 7, 16, kv_dtype, there)) == memory.nbytes(cache)


def test_last():
    rng = random.Random(0)
    for _ in range(200):
        most, last = rng.randrange(1, 3000), rng.randrange(0, 3000)
        assert plan._last(lambda x, last=last: x <= last, most) == min(most, last)


# Processes


def request_of(path, child, monkeypatch, timeout=60.0):
    monkeypatch.setattr(plan, "_CHILD", child)
    return plan.plan_for(plan.find_header(str(path)), plan.Case("t4", 64, 1), timeout)


def test_a_compiler_that_dies_or_hangs_is_named(path, monkeypatch):
    died = request_of(path, "import os, sys; print('LLVM ERROR: no', file=sys.stderr, flush=True); os.abort()", monkeypatch)
    assert "SIGABRT" in died.error and "LLVM ERROR: no" in died.error and died.fits is None and died.dtype == "float16"
    hung = request_of(path, "import time; time.sleep(60)", monkeypatch, timeout=1.0)
    assert "1 s" in hung.error
    assert "exit code 3" in request_of(path, "raise SystemExit(3)", monkeypatch).error


def test_what_is_raised_in_the_process_comes_back(path, monkeypatch):
    child = (
        "from pallas_kernels import aot\nfrom ferrum_jax import plan\n"
        "def fail(*args, **options):\n    print('noise')\n    raise NotImplementedError('no lowering\\nmore')\n"
        "aot.compile_for = fail\nplan.main()"
    )
    assert request_of(path, child, monkeypatch).error == "NotImplementedError: no lowering"


# The command line


@pytest.fixture
def compiled(monkeypatch):
    """Plans are computed in this process by the stand-in; t4 dies."""
    monkeypatch.setattr(aot, "compile_for", compiler(lambda batch, tokens: 5 << 20))

    def plan_for(header, request, timeout):
        if request.target == "t4":
            return plan.Plan("t4", "t4", "float16", "float16", error="the compiler's process ended with SIGABRT: no")
        return plan.compute(header, request)

    monkeypatch.setattr(plan, "plan_for", plan_for)


def test_plan_command(cut, compiled, capsys):
    assert main(["plan", str(cut), "--target", "l4,V5E", "--target", "l4", "--context", "256", "--batch", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and [t["target"] for t in report["targets"]] == ["l4", "v5e"]
    assert report["context"] == 256 and report["batch"] == 3 and "jax" in report["versions"]
    for row in report["targets"]:
        assert row["fits"] and row["total_bytes"] <= row["limit_bytes"] <= row["memory_bytes"]
        assert row["total_bytes"] >= row["weights_bytes"] + row["kv_bytes"] + row["temporaries_bytes"]
        assert row["tokens_per_s"] > 0 and row["largest_batch"] >= 3 and row["largest_context"] == 4096
    assert main(["plan", str(cut), "--target", "l4"]) == 0
    text = capsys.readouterr().out
    for part in ("NVIDIA L4", "fits", "yes", "weights", "KV cache", "temporaries", "16.5 GiB", "tokens/s", "4,096"):
        assert part in text


def test_a_failed_compiler_does_not_end_the_command(cut, compiled, capsys):
    assert main(["plan", str(cut), "--target", "t4,l4"]) == 1
    out, err = capsys.readouterr()
    assert "SIGABRT" in out and "NVIDIA L4" in out and err == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "l5"], "t4, a100-40g, l4, h100, h200, v5e, v6e, v5p"),
        ([], "--target is missing"),
        (["--target", "l4", "--context", "4097"], "4096"),
        (["--target", "l4", "--context", "0"], "--context"),
        (["--target", "l4", "--batch", "0"], "--batch"),
        (["--target", "l4", "--dtype", "fp8"], "--dtype"),
    ],
)
def test_mistakes_of_the_user(flags, said, cut, compiled, capsys):
    assert main(["plan", str(cut), *flags]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""


def test_missing_wheels_and_a_wrong_setting(cut, compiled, monkeypatch, capsys):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "75%")
    assert main(["plan", str(cut), "--target", "l4"]) == 2
    assert "XLA_CLIENT_MEM_FRACTION is '75%'" in capsys.readouterr().err
    monkeypatch.setattr(aot, "missing", lambda name: "libtpu (pip install 'ferrum-jax[aot]')")
    assert main(["plan", str(cut), "--target", "v5e"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'ferrum-jax[aot]'" in err and err.count("\n") == 1
