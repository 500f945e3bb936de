"""Faults found in downloading and caching, each put back into our own source: its guard must fail."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ferrum_jax as fj
from ferrum_jax import hub, loading, program_store
from ferrum_jax.hub import cache as hub_cache
from ferrum_jax.hub import huggingface, web
from pallas_kernels import cache
from pallas_kernels.native import build
from support import hub_server
from support.patching import Fault, applied

NAME = "someone/Tiny"
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 16}


@contextlib.contextmanager
def server() -> Iterator[tuple[hub_server.Hub, Path]]:
    """A hub with one checkpoint directory, whose small files it redirects to, and a folder for the cache."""
    with hub_server.serve() as made, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
            patch.delenv(name)
        for name, value in (("FERRUM_JAX_CACHE", f"{folder}/cache"), ("HF_HOME", f"{folder}/hf"), ("HF_ENDPOINT", made.url)):
            patch.setenv(name, value)
        made.repos[NAME], made.git = dict(FILES), {"config.json", "tokenizer.json"}
        yield made, Path(folder)


def pulled() -> Path:
    """The directory from `pull`, which must be complete."""
    path = hub.pull(NAME)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    return path


def noticing(*errors: type[Exception]) -> contextlib.AbstractContextManager:
    """Turns our own errors into the failure of a guard."""

    @contextlib.contextmanager
    def block():
        try:
            yield
        except errors as error:
            raise AssertionError(str(error)) from error

    return block()


def relative_redirects_are_followed():
    with server() as (made, _), noticing(fj.ModelNotFoundError):
        made.redirects = [{"to": "", "says": "X_Repo_Commit ETag"}]
        pulled()


def a_redirect_that_leaves_the_hub_is_not_followed():
    with server() as (made, _), noticing(fj.ModelNotFoundError):
        made.redirects = [{"to": made.url.replace("127.0.0.1", "localhost"), "says": "X_Repo_Commit ETag X_Linked_Size"}]
        huggingface._head(NAME, "config.json")
        assert not any(path.startswith("/hop") for _, path, _ in made.log)


def the_length_of_a_redirect_is_no_files():
    with server() as (made, _):
        made.redirects = [{"to": "http://127.0.0.1:9", "says": "X_Repo_Commit ETag"}]
        try:
            assert huggingface._head(NAME, "config.json").size == len(FILES["config.json"])
        except hub.SourceError as error:
            assert "size" in str(error)


def damage_of_the_same_size_is_found():
    with server():
        path = pulled() / "model.safetensors"
        path.write_bytes(path.read_bytes()[::-1])
        pulled()


def a_cut_file_is_not_used():
    with server(), pytest.MonkeyPatch.context() as patch:
        path = pulled()
        patch.setattr(hub_cache, "_QUICK", 0)
        (path / "model.safetensors").write_bytes(b"")
        assert (hub.resolve(NAME) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def a_lost_small_file_is_missed():
    with server():
        (pulled() / "tokenizer.json").unlink()
        pulled()


def what_an_older_version_fetched_is_compared():
    with server(), noticing(fj.ModelNotFoundError):
        path = pulled()
        records = list((hub.cache_root() / "records").rglob("*.json"))
        assert records
        for kept in records:
            kept.unlink()
        (path / "config.json").write_bytes(FILES["config.json"][::-1])
        pulled()


def a_token_is_never_shown():
    with server(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_q7x\nz9w")
        with pytest.raises(fj.ModelNotFoundError) as caught:
            hub.resolve(NAME)
        assert "z9w" not in str(caught.value) and "HF_TOKEN" in str(caught.value)


@contextlib.contextmanager
def code_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FERRUM_JAX_CACHE", folder)
        patch.setattr(program_store, "directory", lambda: Path(folder) / "programs")
        yield Path(folder)


def library(folder: Path, patch: pytest.MonkeyPatch, built: list[str]) -> Path:
    def compiled(compiler: str, sets: tuple[str, ...], work: Path) -> Path:
        built.append(compiler)
        (work / "kernels.so").write_bytes(b"library")
        return work / "kernels.so"

    patch.setattr(build, "_compiled", compiled)
    return build._built("/bin/echo")


def a_damaged_library_is_not_loaded():
    with code_folder() as folder, pytest.MonkeyPatch.context() as patch:
        path = library(folder, patch, [])
        path.write_bytes(b"librarx")
        assert library(folder, patch, []).read_bytes() == b"library"


def a_file_is_on_the_disk_first():
    with code_folder() as folder, pytest.MonkeyPatch.context() as patch:
        synced: list[int] = []
        patch.setattr(cache.os, "fsync", synced.append)
        library(folder, patch, [])
        assert synced


def others_cannot_bring_code():
    with code_folder() as folder, pytest.MonkeyPatch.context() as patch, noticing(OSError):
        built: list[str] = []
        library(folder, patch, built)
        (folder / "native").chmod(0o777)
        library(folder, patch, built)
        assert len(built) == 2
        (folder / "programs").mkdir()
        (folder / "programs").chmod(0o777)
        assert cache.distrusted(folder / "programs")


def killed_work_is_swept():
    with code_folder() as folder, pytest.MonkeyPatch.context() as patch:
        (folder / "native" / ".work-x").mkdir(parents=True)
        (folder / "native" / ".work-x" / "lock").write_text("held once")
        library(folder, patch, [])
        assert len(list((folder / "native").iterdir())) == 1


def running_work_is_left():
    with code_folder() as folder, cache.workspace(folder) as one, cache.workspace(folder):
        assert one.is_dir()


def damaged_programs_are_not_read():
    with code_folder() as folder:
        cache.write_sealed(folder / "programs" / "one", b"content")
        path = folder / "programs" / "one"
        path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT"))
        assert cache.read_sealed(path) is None


def nothing_is_built_for_what_is_no_model():
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("prepare", "refusal"):
            patch.setattr(loading.native, name, lambda *_: pytest.fail("kernels were built"))
        (Path(folder) / "broken.gguf").write_bytes(b"GGUF")
        for source, error in (("tinny", fj.ModelNotFoundError), (f"{folder}/broken.gguf", fj.ModelFileError)):
            with pytest.raises(error):
                fj.load(source)


def one_variable_moves_the_kernels():
    with code_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "other"))
        assert library(folder, patch, []).parent == folder / "native"


FAULTS = {
    "a relative redirect of a HEAD is not followed": (
        web._stays,
        "return not there.scheme",
        "return False",
        relative_redirects_are_followed,
    ),
    "a HEAD follows an absolute redirect": (
        web._stays,
        "return not all_said and (",
        "return True or (",
        a_redirect_that_leaves_the_hub_is_not_followed,
    ),
    "a redirect's Content-Length is the file's": (
        web.head,
        'said.pop("content-length", None)',
        "pass",
        the_length_of_a_redirect_is_no_files,
    ),
    "a cached file's content is not compared": (
        hub_cache.damage,
        "not is_whole(path, size, sha256)",
        "False",
        damage_of_the_same_size_is_found,
    ),
    "a cached file's size is not compared": (
        hub_cache.damage,
        "path.stat().st_size != size",
        "False",
        a_cut_file_is_not_used,
    ),
    "a small file that is missing is not missed": (
        huggingface.files_of,
        "sorted({*there, *recorded_files(snapshot)})",
        "there",
        a_lost_small_file_is_missed,
    ),
    "what has no record is taken for whole": (
        huggingface.cached,
        "if not (unknown or source.sha256 or all(map(is_known, files))):",
        "if False:",
        what_an_older_version_fetched_is_compared,
    ),
    "git's sha1 is not compared": (
        huggingface._is_here,
        "digest = source.sha256 or remote.digest",
        "digest = source.sha256 or remote.sha256",
        what_an_older_version_fetched_is_compared,
    ),
    "any token is sent": (
        web._sendable,
        'if re.fullmatch(r"[!-~]*", secret):',
        "if True:",
        a_token_is_never_shown,
    ),
    "a library's digest is not compared": (
        build._built,
        "if path.name == _named(name, path):",
        "if True:",
        a_damaged_library_is_not_loaded,
    ),
    "a library is moved before it is on the disk": (
        cache.put,
        "os.fsync(file.fileno())",
        "pass",
        a_file_is_on_the_disk_first,
    ),
    "a folder of the user's own that was open stays open": (
        cache.make_private,
        "found.st_mode & _OTHERS",
        "False",
        others_cannot_bring_code,
    ),
    "others may write to a folder of programs": (
        cache.distrusted,
        "if others:",
        "if False:",
        others_cannot_bring_code,
    ),
    "killed work is left": (
        cache._is_abandoned,
        "return _taken(lock)",
        "return False",
        killed_work_is_swept,
    ),
    "running work is swept": (
        cache._is_abandoned,
        "return _taken(lock)",
        "return True",
        running_work_is_left,
    ),
    "a program's digest is not compared": (
        cache.read_sealed,
        "hashlib.sha256(content).digest() == sealed[-_DIGEST:]",
        "True",
        damaged_programs_are_not_read,
    ),
    "kernels are built before the model is looked for": (
        loading.load,
        "checked_format(quantize)",
        "checked_format(quantize); native.prepare(progress)",
        nothing_is_built_for_what_is_no_model,
    ),
    "kernels lie elsewhere": (
        build._built,
        'cache.cache_root() / "native"',
        'Path(os.environ.get("XDG_CACHE_HOME", "~")) / "ferrum_jax" / "native"',
        one_variable_moves_the_kernels,
    ),
}


@pytest.mark.parametrize("guard", {fault[3].__name__: fault[3] for fault in FAULTS.values()}.values())
def test_without_a_fault_the_guards_are_content(guard):
    guard()


@pytest.mark.parametrize("what", FAULTS)
def test_every_fault_is_noticed(what):
    fault = Fault(what, *FAULTS[what])
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
