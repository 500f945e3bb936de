"""Repositories without .gguf files: the whole checkpoint is fetched as a directory, but only its header for a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferrum_jax as fj
from ferrum_jax import hub as hub_module
from ferrum_jax import plan
from ferrum_jax.hub import huggingface, list_cached, resolve
from ferrum_jax.loading import validate
from ferrum_jax.weights.opening import open_model
from support.directories import LLAMA, write
from support.goldens import tiny_directories
from support.hub_server import COMMIT
from unit.hub.test_hub import failure, hub, leftovers, surroundings  # noqa: F401

REPO = "someone/Tiny"
SHARDED = tiny_directories.Spec("s", "LlamaForCausalLM", layers=1, hidden=64, heads=2, kv_heads=1, head_dim=32, ff=64, shards=2)


@pytest.fixture
def repository(hub, tmp_path: Path):  # noqa: F811
    path = write(SHARDED, tmp_path / "made")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    others = {
        "README.md": b"x",
        "pytorch_model.bin": b"x" * 99,
        "adapter_model.safetensors": b"x",
        "original/params.json": b"{}",
    }
    hub.repos[REPO] = files | others
    return hub


def test_files_of_a_directory() -> None:
    def files(names: str) -> list[str]:
        return huggingface.directory_files(names.split())

    assert files("config.json model.safetensors tokenizer.json README.md pytorch_model.bin") == [
        "config.json", "tokenizer.json", "model.safetensors",
    ]  # fmt: skip
    pooled = (
        "1_Pooling/config.json config.json model.safetensors modules.json 2_Normalize/config.json vocab.txt onnx/config.json"
    )
    assert files(pooled) == ["config.json", "1_Pooling/config.json", "modules.json", "vocab.txt", "model.safetensors"]
    assert files("model.safetensors tokenizer.json") == files("config.json pytorch_model.bin") == []
    named = "config.json model.safetensors chat_template.jinja additional_chat_templates/a.jinja added_tokens.json x/a.jinja"
    assert files(named) == [
        "config.json", "additional_chat_templates/a.jinja", "added_tokens.json", "chat_template.jinja", "model.safetensors",
    ]  # fmt: skip
    sharded = "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
    assert files(sharded + " consolidated.safetensors adapter_model.safetensors") == [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert files("config.json gptq_model-4bit-128g.safetensors quantize_config.json")[1:] == [
        "quantize_config.json", "gptq_model-4bit-128g.safetensors",
    ]  # fmt: skip


def test_a_directory_is_fetched_whole(repository) -> None:
    path = resolve(REPO)
    assert path == hub_module.cache_root() / "hub" / "someone--Tiny" / COMMIT and not leftovers()
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "tokenizer.json", "model-00002-of-00002.safetensors"} <= names
    assert not names & {"README.md", "pytorch_model.bin", "adapter_model.safetensors", "original"}
    validate(path)
    before = len(repository.log)
    assert resolve(REPO) == resolve(REPO, offline=True) == path and len(repository.log) == before
    [listed] = list_cached()
    assert (listed.name, listed.path) == (REPO, path) and listed.bytes == sum(file.stat().st_size for file in path.iterdir())


def test_an_interrupted_fetch_is_no_directory(repository) -> None:
    repository.drop_after = [10**9] * 6 + [0] * 3
    assert "kept" in failure(REPO)
    assert list_cached() == [] and "not asked, offline" in failure(REPO, offline=True)
    repository.drop_after = []
    assert fj.load(REPO, dtype="float32").config.num_layers == 1


def test_a_gguf_file_goes_first_and_a_selection_means_one(repository) -> None:
    assert "no .gguf" in failure(REPO + ":Q4_K_M")
    repository.repos[REPO]["tiny.Q4_K_M.gguf"] = b"GGUF"
    assert resolve(REPO).name == "tiny.Q4_K_M.gguf"


def test_only_headers_are_fetched_for_a_plan(repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface, "_HEADS", (600, 1 << 20))  # the first is too little
    files = repository.repos[REPO]
    with open_model(write(LLAMA, tmp_path / "same")) as model:
        expected = {name: (info.format, info.shape, info.nbytes) for name, info in model.tensors.items()}
    header = plan.find_header(REPO)
    assert {name: (info.format, info.shape, info.nbytes) for name, info in header.tensors.items()} == expected
    assert header.config().num_layers == 1 and not any("tokenizer" in entry[1] for entry in repository.bodies())
    files["config.json"] = files["config.json"].replace(b"LlamaForCausalLM", b"OtherForCausalLM")
    with pytest.raises(fj.UnsupportedModelError, match="OtherForCausalLM"):
        plan.find_header(REPO)
