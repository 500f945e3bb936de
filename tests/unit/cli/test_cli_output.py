"""What the verbs print about a file and the machine: plain text, in lines that fit a terminal of any width."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import gguf
import numpy as np
import pytest

from ferrum_jax import hub
from ferrum_jax.cli import doctor, inspect, main, output
from ferrum_jax.weights.opening import open_model
from support.terminals import in_terminal
from unit.cli.test_cli import small_gguf

STRING, ARRAY, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32
OTHER_TYPES = [
    (["mit", "apache-2.0"], ARRAY, STRING, "mit, apache-2.0"),
    ([1, 2, 3], ARRAY, gguf.GGUFValueType.INT32, "1, 2, 3"),
    ([True, False], ARRAY, gguf.GGUFValueType.BOOL, "True, False"),
    (True, gguf.GGUFValueType.BOOL, None, "yes"),
    (7, gguf.GGUFValueType.UINT8, None, "7"),
    (0, gguf.GGUFValueType.UINT8, None, "0"),
    (1.5, FLOAT, None, "1.5"),
    (
        "\x1b]0;title\x07\x1b[31mred\x9b2J\r\nnext\u202eline\u2028end",
        STRING,
        None,
        "␛]0;title␇␛[31mred\ufffd2J next\ufffdline end",
    ),
    ("x" * 5000, STRING, None, "x" * 200 + "..."),
]


@pytest.mark.parametrize(("value", "kind", "element", "shown"), OTHER_TYPES, ids=range(len(OTHER_TYPES)))
def test_names_and_licences_of_any_type_are_plain_text(tmp_path, monkeypatch, capsys, value, kind, element, shown):
    for method, key in (
        ("add_name", "general.name"),
        ("add_license", "general.license"),
        ("add_tokenizer_pre", "tokenizer.ggml.pre"),
    ):
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, _, key=key: self.add_key_value(key, value, kind, element))
    path = str(small_gguf(tmp_path / "odd.gguf"))
    assert main(["info", path]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count(shown) >= 3
    assert all(letter == "\n" or letter.isprintable() for letter in out)
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == facts["licence"] == facts["tokenizer"]["pre"] == shown


def test_plain_takes_what_json_and_numpy_have():
    assert output.plain({"id": "mit", "url": ["a"]}) == "id: mit, url: ['a']"
    assert output.plain(np.arange(100)) == "0, 1, 2, 3, 4, 5, 6, 7, ..."
    assert output.plain(np.float32(0.5)) == "0.5" and output.plain(None) == "None"
    assert output.plain("\ud800 \x00") == "\ufffd ␀"


def test_an_error_shows_no_control_characters(tmp_path, capsys):
    path = tmp_path / "a\x1b[31m.gguf"
    path.write_bytes(b"GGUF")
    assert main(["info", str(path)]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and "␛[31m.gguf" in err


LONG = Path("/home/someone/.cache/ferrum_jax/hub/owner--a-model-with-a-long-name/0123456789abcdef/a-model-Q4_K_M.gguf")


def lines_without_color(shown: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "").splitlines()


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("flags", [[], ["--long"]])
def test_info_in_a_terminal(tmp_path, columns, flags):
    folder = tmp_path / "a folder with spaces and a rather long name" / "b"
    folder.mkdir(parents=True)
    path = small_gguf(folder / "tiny.gguf", experts=8)
    code, shown = in_terminal(columns, "info", str(path), *flags)
    lines = lines_without_color(shown)
    assert code == 0
    assert lines[0].startswith("tiny: can be loaded")
    assert any(line.endswith(str(path)) for line in lines)
    assert all(len(line) <= columns for line in lines if str(path) not in line)
    with open_model(path) as source:
        facts = inspect.describe(source)
    for row in facts["formats"]:
        assert {f"{row['weights']:,}", f"{row['bytes']:,}"} <= set(shown.split())
    assert ("rope" in shown) == bool(flags)


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("flags", [[], ["--long"]])
def test_list_in_a_terminal(columns, flags):
    code = f"""
import types
from pathlib import Path
from ferrum_jax import hub
cached = types.SimpleNamespace(name="owner/a\\x1b[1m-model", path=Path({str(LONG)!r}), bytes=123456789012, source="hub owner/a")
hub.list_cached = lambda: [cached]
"""
    status, shown = in_terminal(columns, "list", *flags, code=code)
    assert status == 0 and "\x1b" not in shown
    assert str(LONG) in shown and "115.0 GiB" in shown and "owner/a␛[1m-model" in shown
    assert ("hub owner/a" in shown) == bool(flags)


@pytest.mark.parametrize("columns", [50, 80])
def test_aliases_in_a_terminal(columns):
    status, shown = in_terminal(columns, "list", "--aliases")
    assert status == 0
    words = set(shown.split())
    for alias in hub.ALIASES.values():
        assert alias.name in words
    for line in shown.splitlines():
        assert len(line) <= columns or len(line.split()) == 1, line


CHOICES = [
    {"operation": "quantized_matmul", "format": name, "backend": backend, "reason": reason}
    for name, backend, reason in (("Q4_K", "native", "first choice"), ("F32", "xla", "native: has no kernel for F32"))
]
REPORT = {
    "problems": [], "versions": {"python": "3.11"}, "auto_dtype": "int8", "cpu_kernels": "avx2", "backends": CHOICES,
    "devices": [{"platform": "cpu", "kind": "cpu", "memory_bytes": 2**34, "in_use_bytes": 2**30, "counted": "memory"}],
    "compilation_cache": {"path": str(LONG), "bytes": 5}, "model_cache": None, "implementations": {"route": ["xla"]},
}  # fmt: skip


@pytest.mark.parametrize("columns", [50, 80])
def test_doctor_in_a_terminal(columns):
    code = f"from ferrum_jax.cli import doctor\ndoctor.examine = lambda: {REPORT!r}"
    status, shown = in_terminal(columns, "doctor", code=code)
    assert status == 0
    assert shown.startswith("everything needed works\n")
    assert str(LONG) in shown and "16.0 GiB" in shown and "Q4_K" not in shown.split()
    assert all(len(line) <= columns for line in shown.splitlines() if str(LONG) not in line)
    status, shown = in_terminal(columns, "doctor", "--all", code=code)
    assert status == 0 and "Q4_K" in shown.split() and "first choice" in shown


def test_what_is_broken_comes_first(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: REPORT | {"problems": ["devices: RuntimeError: none"], "backends": None})
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("broken:\n  devices: RuntimeError: none\n")


def test_where_there_is_no_terminal_a_row_is_a_line(monkeypatch, capsys):
    cached = types.SimpleNamespace(name="a", path=LONG, bytes=2**31, source="hub")
    monkeypatch.setattr(hub, "list_cached", lambda: [cached])
    assert main(["list", "--long"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "2.0", "GiB", str(LONG), "hub"]


def test_a_word_is_never_broken():
    text = "x" * 60 + " 1,234,567,890,123,456,789,012,345 GiB of a-word-with-hyphens-in-it"
    lines = output.wrapped(text, 30, "  ").splitlines()
    assert [line.strip() for line in lines] == [
        "x" * 60,
        "1,234,567,890,123,456,789,012,345 GiB",
        "of a-word-with-hyphens-in-it",
    ]
    assert output.wrapped(Path("/a b/c d"), 3, "") == "/a b/c d"
