"""Programs kept on disk: their key has everything that decides what they are, they give the same results, and never cause a
failure."""

import dataclasses
import functools
import os
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ferrum_jax import functional as F
from ferrum_jax import program_store, programs
from ferrum_jax.distributed import Placement
from pallas_kernels import dispatch
from support.random_models import DENSE, tiny_params

HERE, DIRECTORY = Placement.of(), program_store.directory


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(program_store, "directory", lambda: tmp_path / "programs")
    return tmp_path / "programs"


@functools.cache
def params(format="Q8_0"):
    return tiny_params(DENSE, lambda *_: format)


def read(runner, config=DENSE, length=5, format="Q8_0"):
    """Hidden states of a prompt by `runner`, a `Programs`, whose cache is donated."""
    cache = F.new_cache(config, num_pages=2)
    inputs = params(format), cache, np.arange(length, dtype=np.int32)[None], np.asarray([length], np.int32), np.int32(0)
    hidden, written = runner.run(F.hidden_chunk, *inputs, donate=(1,), chunk=length, config=config)
    return np.asarray(hidden), np.asarray(written.pages), cache.pages.is_deleted()


def untraced(monkeypatch):
    """A `Programs` that cannot compile."""
    monkeypatch.setattr(programs.jax, "jit", lambda *_, **__: pytest.fail("this program was traced"))
    return programs.Programs(HERE)


@pytest.mark.slow
def test_a_kept_program_is_neither_traced_nor_other(folder, monkeypatch):
    fresh = read(programs.Programs(HERE))
    assert len(os.listdir(folder)) == 1
    runner = untraced(monkeypatch)
    kept = read(runner)
    assert all(np.array_equal(a, b) for a, b in zip(fresh, kept, strict=True)) and kept[2]
    assert "KV cache" in runner._newest.count() and "temporaries" in runner._newest.count()


@pytest.mark.slow
def test_what_decides_a_program_is_in_its_name(folder, monkeypatch):
    runs = [
        lambda: read(programs.Programs(HERE)),
        lambda: read(programs.Programs(HERE), length=6),
        lambda: read(programs.Programs(HERE), format="Q4_0"),
        lambda: read(programs.Programs(HERE), dataclasses.replace(DENSE, rms_norm_eps=1e-5)),
    ]
    for run in runs:
        run()
    assert len(os.listdir(folder)) == len(runs)
    changes = [
        lambda patch: patch.setattr(program_store, "_code", lambda: "another version"),
        lambda patch: patch.setattr(program_store, "_instructions", lambda: "another processor"),
        lambda patch: patch.setattr(program_store.native, "isa", lambda: "abacus"),
        lambda patch: patch.setattr(program_store.jax, "__version__", "0.99"),
        lambda patch: patch.setitem(programs.COMPILER_OPTIONS, "cpu", {"xla_backend_optimization_level": 1}),
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"),
    ]
    for number, change in enumerate(changes):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            runs[0]()
        assert len(os.listdir(folder)) == len(runs) + number + 1
    with jax.default_matmul_precision("bfloat16"):
        runs[0]()
    assert len(os.listdir(folder)) == len(runs) + len(changes) + 1
    untraced(monkeypatch)
    for run in runs:
        run()


@pytest.mark.slow
def test_a_program_compiled_again_is_kept_whole_beside_the_cache_of_xla(folder, tmp_path, monkeypatch):
    changes = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in changes}
    try:
        compilation_cache.reset_cache()
        for name, value in changes.items():
            jax.config.update(name, value)
        fresh = read(programs.Programs(HERE))
        (path,) = folder.iterdir()
        path.unlink()
        read(programs.Programs(HERE))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert any(path.name.startswith("jit_hidden_chunk") for path in (tmp_path / "xla").iterdir())
    assert np.array_equal(read(untraced(monkeypatch))[0], fresh[0])


def name(function=F.unembed):
    return program_store.key(HERE, function, {}, ((4,),), (), None)


def test_some_programs_are_not_kept(folder, monkeypatch):
    assert name() == name() is not None
    assert name(read) is name(functools.partial(F.unembed)) is None
    assert programs.Programs(HERE).run(functools.partial(jax.numpy.add, 1), np.ones(2, np.float32)).tolist() == [2, 2]
    with dispatch.record():
        assert name() is None
    monkeypatch.setattr(program_store, "directory", lambda: None)
    assert name() is None


def test_the_folder_is_that_of_the_compilation_cache(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(program_store, "directory", DIRECTORY)
    settings = types.SimpleNamespace(jax_compilation_cache_dir=str(tmp_path), jax_enable_compilation_cache=True)
    monkeypatch.setattr(program_store.jax, "config", settings)
    assert program_store.directory() == tmp_path / "programs"
    for change in (
        {"jax_compilation_cache_dir": None},
        {"jax_compilation_cache_dir": "gs://b"},
        {"jax_enable_compilation_cache": False},
    ):
        monkeypatch.setattr(program_store.jax, "config", types.SimpleNamespace(**vars(settings) | change))
        assert program_store.directory() is None


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\x80no pickle", None])
def test_a_damaged_file_is_replaced(folder, content):
    fresh = read(programs.Programs(HERE))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert np.array_equal(read(programs.Programs(HERE))[0], fresh[0])
    assert path.stat().st_size > len(whole) // 2


@pytest.mark.slow
def test_a_folder_that_cannot_be_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(program_store, "directory", lambda: tmp_path / "file" / "programs")
    assert np.isfinite(read(programs.Programs(HERE))[0]).all()


@pytest.mark.slow
def test_those_unused_for_longest_make_room(folder, monkeypatch):
    for number, length in enumerate((3, 4, 5)):
        read(programs.Programs(HERE), length=length)
        newest = max(folder.iterdir(), key=os.path.getmtime)
        os.utime(newest, (number, number))
    sizes = [path.stat().st_size for path in folder.iterdir()]
    read(programs.Programs(HERE), length=3)  # used again: now the newest
    monkeypatch.setattr(program_store, "_LIMIT", sum(sizes) + sizes[0] // 2)  # one too many
    read(programs.Programs(HERE), length=6)
    untraced(monkeypatch)
    for length in (3, 5, 6):
        read(programs.Programs(HERE), length=length)
    with pytest.raises(pytest.fail.Exception, match="traced"):
        read(programs.Programs(HERE), length=4)
