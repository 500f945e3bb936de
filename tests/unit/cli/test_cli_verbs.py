"""Verbs and arguments as a newcomer would write them."""

from __future__ import annotations

import json

import pytest

import ferrum_jax as fj
from ferrum_jax import hub
from ferrum_jax.cli import bench, main
from unit.cli.test_cli import model  # noqa: F401

PROMPTS = [
    (["m", "hi there"], "m", "hi there"),
    (["m", "hi", "there"], "m", "hi there"),
    (["hi there"], "tiny", "hi there"),
    (["m", "--prompt", "hi"], "m", "hi"),
    (["owner/repo:Q4_K_M", "hi"], "owner/repo:Q4_K_M", "hi"),
]


@pytest.mark.parametrize(("arguments", "source", "prompt"), PROMPTS)
def test_the_prompt_may_follow_the_model(model, arguments, source, prompt):  # noqa: F811
    assert main(["run", *arguments]) == 0
    assert model.loads[0]["source"] == source
    assert model.made[0].asked == [([{"role": "user", "content": prompt}], {})]


def test_a_file_with_spaces_in_its_name_is_a_model(model, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "a model.gguf"
    path.touch()
    assert main(["run", str(path), "hi"]) == main(["run", str(path), "--prompt", "hi"]) == 0
    assert [load["source"] for load in model.loads] == [str(path)] * 2


MISTAKES = [
    (["run", "m", "a", "--prompt", "b"], "twice"),
    (["convert", "m", "out"], "--to is missing: --to gguf"),
    (["fly"], "--help lists them"),
    (["rm"], "MODEL"),
    (["rm", "no-such-model"], "ferrum-jax list"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_would_be_right(model, monkeypatch, capsys, arguments, says):  # noqa: F811
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and not model.loads


def test_version_and_ls_are_verbs(capsys):
    assert main(["version"]) == 0 and capsys.readouterr().out == f"ferrum-jax {fj.__version__}\n"
    assert main(["ls", "--json"]) == main(["list", "--json"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_fp8_has_one_name_and_the_other_is_taken(model):  # noqa: F811
    assert main(["run", "m", "a", "--kv-dtype", "fp8"]) == main(["run", "m", "a", "--kv-dtype", "float8_e4m3fn"]) == 0
    assert [load["kv_dtype"] for load in model.loads] == ["fp8", "fp8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "flags", "prompts", "generated"),
    [
        (40960, [], (64, 512), 64),
        (512, [], (64, 448), 64),
        (128, [], (64, 96), 32),
        (64, [], (48,), 16),
        (512, ["--prompt-len", "500"], (500,), 12),
        (512, ["--gen-len", "100"], (64, 412), 100),
    ],
)
def test_bench_without_lengths_fits_the_context(model, monkeypatch, capsys, context, flags, prompts, generated):  # noqa: F811
    monkeypatch.setattr(bench, "measure", lambda loaded, *shape: ({"shape": shape}, []))
    monkeypatch.setattr(bench, "check_content", lambda *_: {})
    monkeypatch.setattr(model, "__init__", lambda self, *a, load=model.__init__, **o: (load(self, *a, **o), vars(self).update(max_seq_len=context))[0])  # fmt: skip  # noqa: E501
    assert main(["bench", "m", *flags, "--batch", "1", "--no-second-start", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [tuple(row["shape"]) for row in rows] == [(1, length, generated) for length in prompts]


# --- rm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a model in two parts, one of a directory's name, and one of huggingface_hub."""
    root = tmp_path / "cache"
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(root))
    names = {
        "a": root / "hub/owner--a/1/a-00001-of-00002.gguf",
        "other": root / "hub/owner--other/1/b.gguf",
        "shared": tmp_path / "huggingface/models--owner--c/c.gguf",
    }
    for path in (*names.values(), names["a"].with_name("a-00002-of-00002.gguf")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    monkeypatch.setattr(hub, "list_cached", lambda: [hub.CachedModel(n, p, 4, "hub") for n, p in names.items() if p.exists()])
    return root


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_rm_deletes_all_parts_and_nothing_else(cache, capsys):
    assert main(["rm", "a", "--yes"]) == 0
    assert files(cache) == ["b.gguf"] and not (cache / "hub/owner--a").exists()
    assert "a-00001-of-00002.gguf" in capsys.readouterr().out
    assert main(["rm", "a", "--yes"]) == 2


def test_rm_asks_first(cache, monkeypatch, capsys):
    for answer, left in (("n\n", 3), ("", 3), ("y\n", 1)):
        reader = (cache / "answer").with_name("answer.txt")
        reader.write_text(answer)
        with reader.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            main(["rm", "a"])
        reader.unlink()
        assert len(files(cache)) == left


@pytest.mark.parametrize("name", ["shared", "b", "", "../cache", "owner"])
def test_rm_leaves_what_is_not_its_own(cache, capsys, name):
    assert main(["rm", "a", name, "--yes"]) == 2
    assert len(files(cache.parent)) == 4
    assert capsys.readouterr().err.count("\n") == 1
