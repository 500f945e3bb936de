"""Where built kernels and compiled programs are kept: damage, killed builds, folders of others; and when kernels are built.

The compiler here is a stand-in that takes no time; its library is arbitrary bytes. test_native runs real ones.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import hub, loading, program_store, programs
from ferrum_jax.distributed.placement import Placement
from pallas_kernels import cache, native
from pallas_kernels.native import build
from support import environment

STAND_IN = """#!{python}
import sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("stand-in 1.0")
    sys.exit()
open({log!r}, "a").write(" ".join(arguments) + chr(10))
time.sleep({seconds})
open(arguments[arguments.index("-o") + 1], "wb").write(b"library" * 1000 if "-shared" in arguments else b"")
"""


def stand_in(folder: Path, seconds: float = 0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "c++"
    path.write_text(STAND_IN.format(python=sys.executable, log=str(folder / "log"), seconds=seconds))
    path.chmod(0o755)
    return path


class Kernels:
    """The stand-in, and the folder that its libraries go to."""

    def __init__(self, tmp_path: Path):
        self.compiler, self.folder, self.log = (
            stand_in(tmp_path / "bin"),
            tmp_path / "cache" / "native",
            tmp_path / "bin" / "log",
        )

    def get(self) -> tuple[Path, int]:
        """The library's path, and how often something was compiled for it."""
        self.log.write_text("")
        path = build._built(str(self.compiler))
        return path, len(self.log.read_text().splitlines())


@pytest.fixture
def kernels(tmp_path, monkeypatch, fresh_library) -> Kernels:
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "cache"))
    return Kernels(tmp_path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_library_is_built_again_and_never_loaded(kernels, how):
    path, built = kernels.get()
    content = path.read_bytes()
    assert built > 1 and kernels.get() == (path, 0)
    DAMAGE[how](path)
    again, built = kernels.get()
    assert built > 1 and again == path and path.read_bytes() == content
    assert [entry.name for entry in kernels.folder.iterdir()] == [path.name]


def test_a_library_that_cannot_be_loaded_is_built_again_once(kernels, monkeypatch):
    """The file is intact, but was built on another machine."""
    tried = []
    monkeypatch.setattr(build, "_compiler", lambda: str(kernels.compiler))
    monkeypatch.setattr(
        build, "_registered", lambda path: tried.append(path) or (_ for _ in ()).throw(OSError("wrong ELF class"))
    )
    kernels.get()
    kernels.log.write_text("")
    assert "wrong ELF class; XLA's own code serves instead" in str(build.refusal())
    assert len(tried) == 2 and kernels.log.read_text().count("-shared") == 1


def test_a_library_is_on_the_disk_before_it_is_in_its_place(kernels, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(cache.os, "fsync", lambda number: order.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number))
    monkeypatch.setattr(cache.os, "replace", lambda a, b: order.append(str(b)) or replace(a, b))
    path, _ = kernels.get()
    assert [Path(name).name for name in order] == ["kernels.so", path.name]


def test_killed_builds_are_swept_and_those_that_run_are_not(kernels, tmp_path):
    slow = stand_in(tmp_path / "slow", 60)
    code = f"from pallas_kernels.native import build; build._built({str(slow)!r})"
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment(), start_new_session=True) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while len(list(kernels.folder.glob("*/lock"))) < 2 or not all(p.read_text() for p in kernels.folder.glob("*/lock")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(children[0].pid, signal.SIGKILL)
        children[0].wait()
        path, _ = kernels.get()
        assert len(left := sorted(kernels.folder.iterdir())) == 2 and path in left
        os.killpg(children[1].pid, signal.SIGKILL)
        children[1].wait()
        path.unlink()
        kernels.get()
        assert list(kernels.folder.iterdir()) == [path]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def test_what_older_versions_left_is_swept(kernels):
    kernels.folder.mkdir(parents=True, mode=0o700)
    for name, age in (("tmpold", 7200), ("tmpnew", 60)):
        (kernels.folder / name).mkdir()
        os.utime(kernels.folder / name, (time.time() - age,) * 2)
    kernels.get()
    assert {path.name[:6] for path in kernels.folder.iterdir()} == {"tmpnew", "kernel"}


# ---- folders of others


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_could_write_to_is_emptied_and_closed(kernels, mode):
    path, _ = kernels.get()
    (kernels.folder / "planted").mkdir()
    kernels.folder.chmod(mode)
    assert "other users can write to" in str(cache.distrusted(kernels.folder))
    again, built = kernels.get()
    assert built > 1 and again == path and list(kernels.folder.iterdir()) == [path]
    assert kernels.folder.stat().st_mode & 0o777 == 0o700


def someone_else(path: Path, monkeypatch) -> None:
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        mine = os.getuid()
        monkeypatch.setattr(cache.os, "getuid", lambda: mine + 1)


@pytest.mark.parametrize("what", ["native", "."])
def test_a_folder_of_another_user_gives_no_code(kernels, what, monkeypatch):
    kernels.get()
    someone_else(kernels.folder.parent / what, monkeypatch)
    with pytest.raises(PermissionError, match=r"belongs to another user, so no code is kept there .*FERRUM_JAX_CACHE"):
        kernels.get()
    monkeypatch.setattr(build, "_compiler", lambda: str(kernels.compiler))
    assert "belongs to another user" in str(build.refusal()) and "XLA's own code serves" in str(build.refusal())


def test_a_folder_above_that_others_can_write_to_counts(tmp_path):
    folder = tmp_path / "a" / "b"
    assert cache.distrusted(folder) is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    assert cache.distrusted(folder) == f"other users can write to {tmp_path / 'a'}"
    (tmp_path / "a").chmod(0o1777)  # like /tmp: other users cannot replace what is in it
    assert cache.distrusted(folder) is None
    link = tmp_path / "link"
    (tmp_path / "a").chmod(0o777)
    link.symlink_to(tmp_path / "a")
    assert cache.distrusted(link / "b") is not None


# ---- programs


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A program that was kept."""
    folder = tmp_path / "programs"
    monkeypatch.setattr(program_store, "directory", lambda: folder)

    def add(x):
        return x + 1

    add.__name__ = f"add_{secrets.token_hex(4)}"  # from XLA's cache a program would come without its code
    program_store.save("one", jax.jit(add).lower(np.zeros(3, np.float32)).compile())
    assert [path.name for path in folder.iterdir()] == ["one"]
    return folder / "one"


def test_a_damaged_program_is_never_unpickled(kept, monkeypatch):
    whole = kept.read_bytes()
    assert program_store.load("one", Placement.of())(np.ones(3, np.float32)).tolist() == [2, 2, 2]
    monkeypatch.setattr(program_store.pickle, "loads", lambda content: pytest.fail("damaged content was unpickled"))
    for place in (0, len(whole) // 2, len(whole) - 1):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert program_store.load("one", Placement.of()) is None and not kept.exists()
    for content in (b"", whole[:-1], whole + b"\0", whole[:20]):
        kept.write_bytes(content)
        assert program_store.load("one", Placement.of()) is None and not kept.exists()


def test_programs_are_not_taken_from_a_folder_of_others(kept, monkeypatch):
    kept.parent.chmod(0o777)
    monkeypatch.setattr(program_store.pickle, "loads", lambda content: pytest.fail("another's program was unpickled"))
    assert program_store.load("one", Placement.of()) is None and kept.exists()
    kept.parent.chmod(0o700)
    someone_else(kept.parent, monkeypatch)
    assert program_store.load("one", Placement.of()) is None and kept.exists()


def test_a_file_that_is_being_written_is_no_program(kept, monkeypatch):
    monkeypatch.setattr(program_store, "_LIMIT", 1)
    with cache.workspace(kept.parent) as work:
        program_store._make_room(kept.parent)
        assert work.is_dir() and not kept.exists()


# ---- one root


@pytest.mark.parametrize("variable", ["FERRUM_JAX_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_one_variable_moves_everything(tmp_path, variable, monkeypatch):
    for name in ("FERRUM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    root = {"FERRUM_JAX_CACHE": tmp_path, "XDG_CACHE_HOME": tmp_path / "ferrum_jax"}.get(
        variable, tmp_path / ".cache/ferrum_jax"
    )
    chosen = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert hub.cache_root() == root and programs.enable_compilation_cache() == root / "xla"
        assert jax.config.values["jax_compilation_cache_dir"] == str(root / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
    assert build._built(str(stand_in(tmp_path / "bin"))).parent == root / "native"


def test_a_place_that_cannot_be_made_leaves_the_cache_off(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "file"))
    chosen = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        programs.enable_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None and "each start compiles again" in caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)


# ---- what is built, and when

AVX512 = "fpu avx2 fma f16c bmi2 avx512f avx512bw avx512dq avx512vl avx512_vnni"


ARM = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid"


@pytest.mark.parametrize(
    ("processor", "listed", "sets"),
    [
        ("x86_64", "flags\t\t: fpu sse2", ["portable"]),
        ("x86_64", "flags : avx2 fma f16c", ["portable"]),
        ("x86_64", "flags : avx2 fma f16c bmi2", ["avx2"]),
        ("AMD64", f"flags : {AVX512}", ["avx512_vnni"]),
        ("x86_64", f"flags : {AVX512.replace('avx512_vnni', '')}", ["avx2"]),
        ("x86_64", f"flags : {AVX512} amx_tile amx_int8", ["amx"]),
        ("x86_64", None, ["amx", "avx512_vnni", "avx2", "portable"]),  # an Intel Mac
        ("aarch64", f"Features\t: {ARM}", ["portable"]),  # a Raspberry Pi 4
        ("aarch64", f"Features : {ARM} asimddp", ["neon_dotprod"]),  # Graviton 2
        ("aarch64", f"Features : {ARM} asimddp sve i8mm bf16", ["neon_i8mm"]),  # Graviton 3
        ("arm64", None, ["neon_i8mm", "neon_dotprod", "portable"]),  # a Mac
        ("arm64", "processor : 0", ["neon_i8mm", "neon_dotprod", "portable"]),
        ("riscv64", "isa : rv64imafdcv", ["portable"]),
    ],
)
def test_only_what_this_cpu_takes_is_built(kernels, processor, listed, sets, monkeypatch):
    text = None if listed is None else f"processor : 0\n{listed}\nprocessor : 1\n{listed}\n"
    assert list(build.instruction_sets(processor, text)) == sets
    monkeypatch.setattr(build.platform, "machine", lambda: processor)
    monkeypatch.setattr(build, "_cpuinfo", lambda: text)
    kernels.get()
    commands = [line for line in kernels.log.read_text().splitlines() if " -c " in line]
    compiled = [name for name in build._ALL if any(f"/{name}.cc" in command for command in commands)]
    with_parts = {"amx": ["amx", "avx512_vnni"], "neon_i8mm": ["neon_i8mm", "neon_dotprod"]}
    assert compiled == list(dict.fromkeys(part for name in sets for part in with_parts.get(name, [name])))
    for command in commands:
        assert all((f"-DFERRUM_WITHOUT_{name.upper()} " in command) == (name not in compiled) for name in build._ALL)
        unit = Path(command.split()[command.split().index("-c") + 1]).stem
        flags = [word for word in command.split() if word.startswith("-m")]
        features = {"neon_dotprod": "+dotprod", "neon_i8mm": "+dotprod+i8mm"}
        assert flags == ([f"-march=armv8.2-a{features[unit]}"] if unit in features else [])


def test_parts_done_are_reported(kernels, monkeypatch):
    monkeypatch.setattr(build, "_compiler", lambda: str(kernels.compiler))
    monkeypatch.setattr(build, "_registered", lambda path: None)
    seen: list[tuple] = []
    for _ in range(2):
        build.library.cache_clear()
        native.prepare(lambda *call: seen.append(call))
    total = kernels.log.read_text().count(" -c ")
    assert [call[:2] for call in seen] == [(0, None), *((done + 1, total) for done in range(total))]
    assert all("building the C++ kernels" in text for _, _, text in seen)


def test_nothing_is_built_for_what_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0 and no more")
    (tmp_path / "empty").mkdir()
    for place, name in ((loading.native, "prepare"), (loading.native, "refusal"), (loading.jax, "devices")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("a device was chosen or a kernel built"))
    for dtype in ("auto", "int8"):
        for name in ("tinny", "no/such.gguf", str(tmp_path / "empty" / "x"), "owner"):
            with pytest.raises(fj.ModelNotFoundError):
                fj.load(name, dtype=dtype)
        for name in ("broken.gguf", "empty"):
            with pytest.raises(fj.ModelFileError):
                fj.load(str(tmp_path / name), dtype=dtype)
    with pytest.raises(ValueError, match="dtype 'int7' is not supported"):
        fj.load("tinny", dtype="int7")
    with pytest.raises(ValueError, match="kv_dtype 'int7' is not supported"):
        fj.load("tinny", kv_dtype="int7")


@pytest.mark.slow
def test_a_cache_elsewhere_leaves_the_home_of_the_user_alone(tmp_path):
    """Kernels, XLA's programs and this package's: all are in the folder that FERRUM_JAX_CACHE names."""
    home, kept = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    variables = environment(HOME=str(home), FERRUM_JAX_CACHE=str(kept))
    variables.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, "-m", "ferrum_jax", "run", "--prompt", "x", "--max-tokens", "2"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
    kernels = {"native"} if build._compiler() else set()
    assert {"xla"} | kernels <= {path.name for path in kept.iterdir()} and any((kept / "xla").rglob("*"))


def test_a_damaged_entry_of_the_cache_of_xla_is_one_line(tmp_path):
    """JAX warns about it at each start, with a place in its own code, and never replaces it."""
    lines = "import jax; from ferrum_jax import cli, programs; programs.enable_compilation_cache(); cli._note_warnings()"

    def run() -> str:
        variables = environment(FERRUM_JAX_CACHE=str(tmp_path))
        command = [sys.executable, "-c", f"{lines}; jax.numpy.arange(3) + 1"]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=True).stderr

    assert run() == ""
    for entry in (tmp_path / "xla").glob("*-cache"):
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 255
        entry.write_bytes(content)
    note = f"note: an entry of XLA's cache is damaged; it is compiled again at each start until you delete {tmp_path}/xla"
    assert run().splitlines() == [note]


def test_kernels_that_cannot_be_had_are_said_at_load(kernels, monkeypatch, caplog):
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(kernels.folder.parent))
    kernels.folder.parent.write_text("a file where the folder of the cache should be")
    model = fj.load("tiny")
    assert model.config.dtype == "float32"
    assert f"the C++ kernels for CPUs are not used: {kernels.folder} cannot be made: Not a directory" in caplog.text
    assert "FERRUM_JAX_CACHE sets another place" in caplog.text and "Errno" not in caplog.text
