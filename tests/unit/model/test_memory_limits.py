"""The memory that there is, on this machine and on devices, and errors that say what is missing before it is taken."""

import types

import jax
import jax.numpy as jnp
import pytest

import ferrum_jax as fj
from ferrum_jax import loading, memory
from ferrum_jax.cli import main
from ferrum_jax.distributed import Placement
from ferrum_jax.errors import OutOfMemoryError
from ferrum_jax.programs import Programs
from ferrum_jax.state import new_cache
from ferrum_jax.weights.gguf import open_gguf
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.stream import abstract_parameters
from support.random_models import DENSE
from support.tiny_gguf import write_tiny_llama

GIB = 1 << 30


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=4096)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def fake_system(root, *, meminfo, cgroup="", files=None):
    files = {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup} | (files or {})
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return memory.host_limit(root)


MEMINFO = "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\nSwapTotal:  1048576 kB\nSwapFree:  524288 kB\n"


def test_limit_of_the_machine(tmp_path):
    assert memory.host_limit(tmp_path) is None
    limit = fake_system(tmp_path, meminfo=MEMINFO)
    assert (limit.total, limit.free) == (9 * GIB, int(4.5 * GIB)) and "machine" in limit.counted


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/jobs/one\n", {"memory.max": "{limit}\n", "memory.stat": "anon {used}\nfile 99999999999\nshmem 0\n"}),
        ("4:memory:/jobs/one\n", {"memory.limit_in_bytes": "{limit}\n", "memory.stat": "total_rss {used}\ntotal_cache 9\n"}),
    ],
)
def test_limit_of_a_control_group_around_this_one(tmp_path, cgroup, files):
    base = "sys/fs/cgroup/" + ("" if cgroup.startswith("0") else "memory/")
    outer = {f"{base}jobs/{name}": text.format(limit=3 * GIB, used=GIB) for name, text in files.items()}
    inner = {f"{base}jobs/one/memory.max": "max\n", f"{base}jobs/one/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
    limit = fake_system(tmp_path, meminfo=MEMINFO, cgroup=cgroup, files=outer | inner)
    assert limit.free == int(2.5 * GIB) and "control group" in limit.counted  # caches can be dropped, swap is there


def test_this_machine_has_a_limit():
    limit = memory.device_limit(jax.devices("cpu")[0])
    assert 0 < limit.free <= limit.total


def test_limit_of_an_accelerator(monkeypatch):
    def device(platform, stats):
        return types.SimpleNamespace(platform=platform, device_kind="NVIDIA L4", memory_stats=lambda: stats)

    limit = memory.device_limit(device("gpu", {"bytes_limit": 1000, "bytes_in_use": 300}))
    assert (limit.total, limit.free) == (1000, 700) and "0.75" in limit.counted
    assert memory.device_limit(device("gpu", None)) is None
    assert "FRACTION" not in memory.device_limit(device("tpu", {"bytes_limit": 5})).counted
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert memory.gpu_fraction()[0] == 0.5
    for wrong in ("0", "nan", "2"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(ValueError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
            memory.gpu_fraction()


def test_load_refuses_before_it_allocates(path, monkeypatch, capsys):
    def never(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(memory, "device_limit", lambda device: memory.Limit(300_000, 250_000, "a small device"))
    monkeypatch.setattr(loading, "read_parameters", never)
    with pytest.raises(OutOfMemoryError) as caught:
        fj.load(path, max_seq_len=1024, kv_dtype="float16")
    text = str(caught.value)
    for part in ("weights ", "KV cache 256.0 KiB for one row of 1,024 tokens (float16)", "48.8 KiB free of 293.0 KiB"):
        assert part in text
    assert "--kv-dtype" in text and "ferrum-jax plan" in text and "quantization" in text
    assert isinstance(caught.value, fj.FerrumError) and isinstance(caught.value, MemoryError)
    assert main(["run", str(path), "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert "the weights do not fit" in err and err.count("\n") == 1


def test_load_refuses_nothing_that_fits(path, monkeypatch):
    with open_gguf(path) as file:
        need = memory.nbytes(abstract_parameters(parameters(file, file.config()), Placement.of()))
    for limit in (memory.Limit(need, 0, "just enough"), None):
        monkeypatch.setattr(memory, "device_limit", lambda device, limit=limit: limit)
        assert fj.load(path).memory()["parameters_total"] == need


def test_a_cache_that_does_not_fit_is_refused_with_its_count(path, monkeypatch):
    model = fj.load(path, dtype="float32")
    monkeypatch.setattr(memory, "device_limit", lambda device: memory.Limit(50_000, 0, "a small device"))
    message = r"a KV cache of 64 pages \(1,024 tokens, float32\) takes .* KiB; .*a small device"
    with pytest.raises(OutOfMemoryError, match=message):
        model.generate(["abc"], fj.SamplingParams(max_tokens=2000, temperature=0.0))


def test_out_of_memory_in_a_program_says_the_count_first():
    def greedy(x, cache):
        return jnp.sort(jnp.broadcast_to(x, (1 << 50,))) * 2, cache

    programs, cache = Programs(Placement.of(jax.devices("cpu")[0])), new_cache(DENSE, num_pages=4)
    with pytest.raises(
        OutOfMemoryError, match=r"^out of memory: the program takes .*KV cache 144.0 KiB.*GiB free of"
    ) as caught:
        programs.run(greedy, jnp.float32(1), cache, donate=(1,))
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    with pytest.raises(OutOfMemoryError) as caught:
        programs.fetch(_Late("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."))
    assert "KV cache 144.0 KiB" in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        programs.fetch(_Late("INTERNAL: something else"))


class _Late:
    """A result whose computation failed."""

    def __init__(self, message):
        self.message = message

    def __array__(self, *_, **__):
        raise jax.errors.JaxRuntimeError(self.message)
