"""A hub that redirects, a damaged cache, a token that cannot be sent. The reference is huggingface_hub on the same hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ferrum_jax import hub as hub_module
from ferrum_jax.cli import main
from ferrum_jax.hub import cache, cache_root, huggingface, pull, resolve, web
from support.hub_server import COMMIT
from unit.hub.test_hub import DATA, REPO, failure, hub, leftovers, surroundings  # noqa: F401

SMALL = b'{"model_type": "llama"}\n'
DIRECTORY = "someone/Tiny"


@pytest.fixture
def repository(hub):  # noqa: F811
    """A checkpoint directory: small files kept by git, weights in large-file storage."""
    hub.repos[DIRECTORY] = {"config.json": SMALL, "tokenizer.json": b"{}" * 50, "model.safetensors": DATA}
    hub.git = {"config.json", "tokenizer.json"}
    return hub


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---- redirects

REDIRECTS = {
    "as the public hub": [{"to": "", "says": "X_Repo_Commit ETag"}],
    "with the size": [{"to": "", "says": "X_Repo_Commit ETag X_Linked_Size"}],
    "that says nothing": [{"to": "", "says": ""}],
    "twice": [{"to": "", "says": ""}, {"to": "", "says": "X_Repo_Commit ETag"}],
    "to its own address": [{"to": "{url}", "says": "X_Repo_Commit ETag"}],
}


@pytest.mark.parametrize("kind", REDIRECTS)
def test_redirects_within_the_hub_are_followed(repository, kind, tmp_path):
    from huggingface_hub import hf_hub_download

    repository.redirects = [step | {"to": step["to"].format(url=repository.url)} for step in REDIRECTS[kind]]
    path = resolve(DIRECTORY)
    assert path.name == COMMIT and files_of(path) == repository.repos[DIRECTORY] and not leftovers()
    for name in repository.git:
        theirs = hf_hub_download(DIRECTORY, name, endpoint=repository.url, cache_dir=tmp_path / "theirs", token=False)
        assert Path(theirs).read_bytes() == (path / name).read_bytes() and Path(theirs).parent.name == COMMIT


@pytest.mark.parametrize("address", ["http://localhost:{port}", "//localhost:{port}", "http://127.0.0.1:9"])
def test_a_head_stops_where_the_hub_is_left(repository, address):
    port = repository.url.rpartition(":")[2]
    repository.redirects = [{"to": address.format(port=port), "says": "X_Repo_Commit ETag X_Linked_Size"}]
    described = huggingface._describe(hub_module.HubSource(DIRECTORY))
    assert [remote.size for remote in described] == [len(SMALL), 100, len(DATA)]
    assert not any(path.startswith("/hop") for _, path, _ in repository.log)
    repository.redirects[0]["says"] = "X_Repo_Commit ETag"  # the length of a redirect is not that of the file
    assert "no commit, ETag or size of config.json" in failure(DIRECTORY)


def test_redirects_end(repository):
    repository.redirects = [{"to": "", "says": "X_Repo_Commit"}] * 12
    assert "redirects in a circle" in failure(DIRECTORY)


# ---- a damaged cache

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of the same size": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "lost": lambda path: path.unlink(),
}


@pytest.mark.parametrize("old", [False, True], ids=["recorded", "by an older version"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_directory_is_fetched_again(repository, how, file, old):
    path = pull(DIRECTORY)
    if old:
        shutil.rmtree(cache_root() / "records")
    os.utime(path / file, (1, 1))
    DAMAGE[how](path / file)
    before = len(repository.bodies())
    assert pull(DIRECTORY) == path and files_of(path) == repository.repos[DIRECTORY]
    assert [entry[1].rpartition("/")[2] for entry in repository.bodies()[before:]] == [file]
    asked = len(repository.log)
    assert pull(DIRECTORY) == resolve(DIRECTORY) == path and len(repository.log) == asked  # now it is recorded


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_fetched_again_and_not_loaded(hub, how):  # noqa: F811
    path = resolve(REPO)
    DAMAGE[how](path)
    seen = []
    assert resolve(REPO, progress=lambda *call: seen.append(call[2])) == path and path.read_bytes() == DATA
    assert how == "lost" or any("is damaged" in text for text in seen)
    DAMAGE[how](path)
    if how != "lost":
        assert f"local cache: {path} is damaged: it " in failure(REPO, offline=True)


def test_large_files_are_read_by_pull_alone(hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cache, "_QUICK", 1000)
    path = resolve(REPO)
    DAMAGE["of the same size"](path)
    before = len(hub.log)
    assert resolve(REPO) == path and len(hub.log) == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub_module.ModelNotFoundError, match="sha256 of its download"):
        pull(REPO)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert pull(REPO) == path and path.read_bytes() == DATA


def test_what_cannot_be_compared_is_taken_and_said(hub, monkeypatch):  # noqa: F811
    path = resolve(REPO)
    shutil.rmtree(cache_root() / "records")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match="unchecked: there is nothing to compare it with"):
        assert pull(REPO) == path
    monkeypatch.delenv("HF_HUB_OFFLINE")
    bodies = len(hub.bodies())
    assert pull(REPO) == path and len(hub.bodies()) == bodies  # compared with the hub's values
    assert cache.recorded(path) == (len(DATA), huggingface.hashlib.sha256(DATA).hexdigest())


def test_an_etag_that_is_no_digest_of_the_file_decides_nothing(repository):
    repository.etags = {"config.json": "a" * 40, "tokenizer.json": "strange"}
    path = pull(DIRECTORY)
    bodies = len(repository.bodies())
    assert pull(DIRECTORY) == path and len(repository.bodies()) == bodies == 3
    DAMAGE["of the same size"](path / "tokenizer.json")
    assert files_of(pull(DIRECTORY)) == repository.repos[DIRECTORY]


def test_a_damaged_file_of_huggingface_hub_is_not_taken(hub, tmp_path):  # noqa: F811
    from huggingface_hub import hf_hub_download

    theirs = Path(hf_hub_download(REPO, "tiny.Q8_0.gguf", endpoint=hub.url, cache_dir=tmp_path / "hf" / "hub", token=False))
    asked = len(hub.log)
    assert pull(f"{REPO}:Q8_0") == theirs and len(hub.log) == asked
    spoilt = theirs.resolve()
    DAMAGE["of the same size"](spoilt)
    path = pull(f"{REPO}:Q8_0")
    assert path.is_relative_to(cache_root()) and path.read_bytes() == DATA[:1000] == resolve(f"{REPO}:Q8_0").read_bytes()
    assert spoilt.read_bytes() != DATA[:1000]  # theirs is read and never written


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_what_an_interrupted_pull_left_is_compared(repository, file, monkeypatch):
    monkeypatch.setattr(huggingface, "PATIENCE_SECONDS", 0.1)
    repository.repos[DIRECTORY]["tokenizer.json"] = DATA[::-1]
    repository.drop_after = [10**9] * (2 if file.startswith("model") else 1) + [400_000] + [0] * 9
    assert "after 400000 of 3000000" in failure(DIRECTORY)
    (part,) = [path for path in leftovers() if path.stat().st_size]
    part.write_bytes(b"\0" * 400_000)
    repository.drop_after = []
    assert files_of(pull(DIRECTORY)) == repository.repos[DIRECTORY]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": "x", "sha256": 1}', "null"])
def test_a_damaged_record_is_none(repository, content):
    path = pull(DIRECTORY)
    records = list((cache_root() / "records").rglob("*.json"))
    assert records
    for kept in records:
        kept.write_text(content)
    assert resolve(DIRECTORY, offline=True) == path
    bodies = len(repository.bodies())
    assert pull(DIRECTORY) == path and len(repository.bodies()) == bodies
    assert all(json.loads(kept.read_text())["size"] for kept in records)


# ---- a token that cannot be sent

SECRET = "hf_" + "s3cret" * 5


@pytest.mark.parametrize("bad", ["\n", "\r\n", " ", "\t", "\x7f", "\x01", "é", "\ufeff", "\udcff"])
@pytest.mark.parametrize("place", ["variable", "file", "path"])
def test_a_token_that_cannot_be_sent_is_named_and_never_shown(hub, place, bad, monkeypatch, tmp_path, capfd):  # noqa: F811
    token = SECRET[:12] + bad + SECRET[12:]
    file = tmp_path / ("hf/token" if place == "file" else "elsewhere")
    if place == "variable":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(token.encode(errors="surrogateescape"))
        if place == "path":
            monkeypatch.setenv("HF_TOKEN_PATH", str(file))
    for name in (f"{REPO}:Q8_0", f"{REPO}:tiny.Q8_0.gguf", DIRECTORY):
        message = failure(name)
        assert ("HF_TOKEN holds" if place == "variable" else f"the file {file} holds") in message
        assert "HF_ENDPOINT" not in message and "s3cret" not in message
    assert main(["pull", REPO]) == 2
    out = "".join(capfd.readouterr())
    assert "s3cret" not in out and "Traceback" not in out
    assert hub.log == []


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}\n", f" {SECRET}\r\n", f"\n{SECRET}"])
def test_a_line_break_at_the_end_is_no_part_of_a_token(hub, token, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", token)
    hub.token = SECRET
    assert web.token() == SECRET and pull(f"{REPO}:Q8_0").read_bytes() == DATA[:1000]


def test_a_password_in_the_address_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{SECRET}@127.0.0.1:9/hub")
    message = failure(REPO)
    assert "HF_ENDPOINT holds a user or a password" in message and SECRET not in message
