"""The advice how to install an extra names a place that has the package."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from pallas_kernels.extras import install

GIT = {"url": "https://example.org/ferrum_jax", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}
# The forms of direct_url.json are those of https://packaging.python.org/en/latest/specifications/direct-url/
CASES = [
    (None, "pip install '.[aot]' in a clone of the repository"),
    ({"url": "file:///no/such/place", "dir_info": {}}, "pip install '.[aot]' in a clone of the repository"),
    (
        {"url": "file:///x/ferrum_jax-0.1.0-py3-none-any.whl", "archive_info": {}},
        "pip install '.[aot]' in a clone of the repository",
    ),
    (GIT, "pip install 'ferrum-jax[aot] @ git+https://example.org/ferrum_jax'"),
    (
        GIT | {"url": "https://name:secret@example.org/ferrum_jax"},
        "pip install 'ferrum-jax[aot] @ git+https://example.org/ferrum_jax'",
    ),
    (
        GIT | {"vcs_info": {"vcs": "git", "commit_id": "0" * 40, "requested_revision": "v1"}},
        "pip install 'ferrum-jax[aot] @ git+https://example.org/ferrum_jax@v1'",
    ),
]


@pytest.mark.parametrize(("came", "advice"), CASES)
def test_the_advice_is_where_the_package_came_from(monkeypatch, came, advice):
    found = SimpleNamespace(read_text=lambda name: None if came is None else json.dumps(came))
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    assert install("aot") == advice


def test_a_clone_is_named(monkeypatch, tmp_path):
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    text = json.dumps({"url": clone.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda _: text))
    assert install("plot") == f"pip install '.[plot]' in {clone}"


def test_without_metadata_there_is_advice_too(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install("docs").startswith("pip install '.[docs]'")
