"""A disk that is full before or while a model is written: one clear error, and nothing is left behind."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import sys
import types

import pytest

from ferrum_jax.cli import main
from ferrum_jax.convert import KINDS
from ferrum_jax.weights.fresh import fresh
from support import environment


@pytest.mark.parametrize("to", KINDS)
def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    out = tmp_path / "new" / "folder" / "out"
    assert main(["convert", "tiny", str(out), "--to", to]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert str(out) in shown.err and "6.7 MiB are needed, 1000 B are free" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", KINDS)
def test_a_limit_that_is_met_while_writing_leaves_nothing(tmp_path, to):
    """A process can set a limit of file sizes for itself; a full disk fails at the same place."""
    out = tmp_path / "new" / "folder" / "out"
    code = "import resource, sys; from ferrum_jax.cli import main\n"
    code += "import ferrum_jax.convert\nferrum_jax.convert.hub.resolve('tiny')\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, {resource.RLIM_INFINITY}))\nsys.exit(main())"
    command = [sys.executable, "-c", code, "convert", "tiny", str(out), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(JAX_PLATFORMS="cpu"))
    ours = [line for line in done.stderr.splitlines() if line.startswith("ferrum-jax")]
    assert done.returncode == 2 and done.stdout == "" and len(ours) == 1
    assert str(out) in ours[0] and ("requested" in ours[0] or "too large" in ours[0])
    assert "os_error_code" not in done.stderr and "Event loop" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", KINDS)
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, capsys, to):
    (tmp_path / "file").touch()
    assert main(["convert", "tiny", str(tmp_path / "file" / "out"), "--to", to]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "file") in err and "--force" not in err
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_an_output_that_appears_meanwhile_is_not_a_full_disk(tmp_path):
    with pytest.raises(FileExistsError, match=r"^out exists$"), fresh(tmp_path / "out", 1):
        raise FileExistsError("out exists")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_was_there_stays(tmp_path, error, kind):
    out = tmp_path / "out"
    out.write_text("before")
    with pytest.raises(type(error)), fresh(out, 1) as partial:
        partial.write_text("half") if kind == "file" else partial.mkdir()
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and out.read_text() == "before"


def test_directories_that_others_use_meanwhile_stay(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(OSError, match="full") as caught, fresh(out, 1):
        (tmp_path / "a" / "other").touch()
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "other"]


def test_directories_made_for_an_output_go_with_it(tmp_path):
    with pytest.raises(OSError, match="full"), fresh(tmp_path / "a" / "b" / "out", 1) as partial:
        partial.touch()
        raise OSError(errno.ENOSPC, "full")
    assert not list(tmp_path.iterdir())


def test_the_space_is_compared_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="are needed"), fresh(tmp_path / "out", 1001):
        raise AssertionError("begun")
    with fresh(tmp_path / "out", 1000) as partial:
        partial.touch()
