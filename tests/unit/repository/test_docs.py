"""The documentation against the program: README's Python runs, links lead somewhere, the table of formats is the code's."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

import ferrum_jax as fj
from pallas_kernels.blocks import FORMATS
from support import ROOT
from support.goldens import golden_cases, tiny_models
from support.tiny_gguf import tiny_vocabulary, write_tiny_llama

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page: Path, folder: Path) -> dict:
    """The names that a page's Python defines; its blocks are one program, with a tiny model in place of the real one."""
    tokens, types = tiny_vocabulary(64)
    tokens[-2:], types[-2:] = ["I", "N"], [1, 1]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    path = write_tiny_llama(folder / "tiny.gguf", metadata=metadata)
    program = "\n".join(blocks(page, "python"))
    assert program.count('"smollm2:135m"') == 1
    names: dict = {}
    exec(compile(program.replace('"smollm2:135m"', repr(str(path))), page.name, "exec"), names)
    return names


@pytest.mark.slow
def test_python_of_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ROOT / "README.md", tmp_path)["requests"]
    assert capsys.readouterr().out


@pytest.mark.slow
def test_python_of_quickstart_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(ROOT / "docs" / "quickstart.md", tmp_path)
    assert names["requests"] and capsys.readouterr().out
    greedy = names["fj"].SamplingParams(max_tokens=names["max_tokens"], temperature=0.0)
    for ids, count, same in zip(names["tokens"], names["made"], names["model"].generate(names["encoded"], greedy), strict=True):
        assert ids[:count].tolist() == same.token_ids


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Every page is in the navigation, every link and every name of the reference is there: warnings are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(name in reference for name in ("max_seqs", "grouped_linear", "page_table"))
    check_reference(reference)


def test_public_names_are_those_of_the_reference() -> None:
    """dir() and help() show exactly `__all__`, each name has a docstring, and the reference has each of them and no other."""
    pages = set(re.findall(r"^::: ferrum_jax\.(\w+(?:\.\w+)?)$", _page("reference.md"), re.MULTILINE))
    assert dir(fj) == sorted(fj.__all__) and {name.split(".")[0] for name in pages} - {"state", "sampling"} == set(fj.__all__)
    shown = pydoc.render_doc(fj, renderer=pydoc.plaintext)
    for name in fj.__all__:
        value = getattr(fj, name)
        assert inspect.getdoc(value), name
        assert inspect.ismodule(value) or re.search(rf"^    (class )?{name}\(", shown, re.MULTILINE), name
    for module in (fj.functional, fj.plotting, fj.progress):
        names = {name for name in module.__all__ if not isinstance(getattr(module, name), int)}
        listed = re.search(
            rf"^::: {module.__name__}\n(?:    .*\n)*?      members: \[(.*)\]", _page("reference.md"), re.MULTILINE
        )
        assert listed
        classes = {"KVCache", "RaggedBatch", "Sampled", "Sampling", "Line"}  # separate, or only parameter types
        assert set(listed[1].split(", ")) == names - classes


def test_internals_of_models_and_requests_are_private() -> None:
    """Everything that a user sees on them is in the reference: a member there or an attribute in the docstring."""
    page = _page("reference.md")
    for kind in ("Model", "Request"):
        members = re.search(rf"::: ferrum_jax.{kind}\n    options:\n      members: \[(.*)\]", page)
        assert members
        public = {name for name in dir(getattr(fj, kind)) if not name.startswith("_")}
        described = re.findall(r"^  (\w+) \(", inspect.getdoc(getattr(fj, kind)) or "", re.MULTILINE)
        assert public <= {*members[1].split(", "), *described}, kind


def check_reference(page: str) -> None:
    """All public names and no others are there, and what has parameters or fields has a table of them, each with a type."""
    parts = re.split(r'<h[34] id="([\w.]+)" class="doc', page)
    entries = dict(zip(parts[1::2], parts[2::2], strict=True))
    internal = ("of_an_engine", ".row", ".longest", ".bucket", ".start", ".advance", "KVCache.empty", "backend_for", "BACKENDS")
    assert [name for name in entries if name.endswith(internal) or "._" in name] == []
    for name, entry in entries.items():
        function = pkgutil.resolve_name(name)
        tables = re.findall(r'<tr class="doc-section-item">.*?</tr>', entry, re.DOTALL)
        if inspect.isfunction(function):
            asked = {each for each in inspect.signature(function).parameters if each not in ("self", "cls")}
        elif dataclasses.is_dataclass(function) and function is not fj.ModelConfig:
            asked = {field.name for field in dataclasses.fields(function)}
        elif issubclass(function if inspect.isclass(function) else int, tuple) and name != "ferrum_jax.sampling.Sampling":
            asked = set(function._fields)
        else:
            continue
        cells = [re.findall(r"<td.*?</td>", row, re.DOTALL) for row in tables]
        rows = {re.sub("<[^>]*>", "", row[0]).strip().lstrip("*"): re.sub("<[^>]*>", "", row[1]).strip() for row in cells}
        assert asked <= set(rows), f"{name}: no row for {asked - set(rows)}"
        assert all(rows[each] for each in asked), f"{name}: no type in {rows}"


def test_code_of_the_site_is_wrapped_and_never_cut() -> None:
    """A line too long for a page continues in the next one; code made for the site has no such lines."""
    assert "site.css" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"pre > code \{[^}]*white-space: pre-wrap;", _page("site.css"))
    for page in (ROOT / "docs" / "quickstart.md", *(ROOT / "docs" / "notebooks").glob("*.md")):
        assert [line for block in blocks(page, "python") for line in block.splitlines() if len(line) > 88] == []


@pytest.mark.slow
def test_python_of_the_notebooks_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks are one program; it runs with a tiny mixture of experts."""
    case = next(case for case in golden_cases.CASES if case.name == "qwen3moe-f32")
    tiny_models.write(case.spec, tmp_path / "tiny.gguf")
    pyplot.switch_backend("agg")
    program = "\n".join(blocks(ROOT / "docs" / "notebooks.md", "python"))
    assert program.count('"qwen3:30b-a3b"') == 1
    names: dict = {}
    exec(compile(program.replace('"qwen3:30b-a3b"', repr(str(tmp_path / "tiny.gguf"))), "notebooks.md", "exec"), names)
    assert capsys.readouterr().out and pyplot.get_fignums()
    pyplot.close("all")
    assert {event.kind for event in names["events"]} == {"prefill", "decode"}


def test_shell_blocks_of_readme_begin_with_its_two_commands() -> None:
    """The first two: install and run; install and test. Scripts take them."""
    run, test = blocks(ROOT / "README.md", "bash")[:2]
    assert "pip install . && .venv/bin/ferrum-jax run" in run and "pytest" in test


def test_picture_of_the_design() -> None:
    """It is small, self-contained, has its own background, and README and the site show it."""
    picture = (ROOT / "docs" / "design.svg").read_text(encoding="utf-8")
    assert len(picture) <= 12_000 and "<image" not in picture and picture.count("http") == 1
    assert "](docs/design.svg)" in (ROOT / "README.md").read_text(encoding="utf-8") and "](design.svg)" in _page("index.md")
    assert f"GGUF, {len(FORMATS)} formats" in picture


def test_families_of_readme() -> None:
    """A cell with a tick has its row in models.md: the golden of such a checkpoint, which another test looks for."""
    of_moe = ["qwen3moe-q4_k_m", "qwen3moe-f32", "gptq-ordered-moe", "", "compressed-channel-moe", "qwen3moe-attention"]
    kinds = ["GGUF", "safetensors", "GPTQ", "AWQ", "compressed-tensors", "LoRA"]
    goldens = {
        "LLaMA": ["llama3-f32", "llama3-bf16", "gptq-llama", "awq-llama", "compressed-asym", "llama-all"],
        "Mistral": ["mistral-f16", "mistral-f32", "", "", "", ""],
        "Qwen2": ["qwen2-tied-bf16", "qwen2-yarn-bf16", "gptq-asym-ordered", "", "", "qwen2"],
        "Qwen3": ["qwen3-q8_0", "qwen3-f16", "gptq8-qwen3", "", "compressed-qwen3", "qwen3"],
        "Qwen3-MoE": of_moe,
        "Mixtral": ["mixtral-q4_0", "mixtral-bf16", "", "awq-mixtral", "", ""],
        "Qwen3.5": ["qwen35-gguf", "qwen35-directory", "", "", "", "qwen35-gguf"],
        "Qwen3-Next": ["qwen3next-gguf", "qwen3next-directory", "", "", "", "qwen3next-directory"],
        "gpt-oss": ["gpt-oss-mxfp4", "gpt-oss-bf16", "", "", "", "gpt-oss-attention"],
        "GLM-4.5": ["glm4moe-q4_k_m-gguf", "glm4moe-directory", "", "", "", ""],
        "DeepSeek": ["deepseek3", "deepseek3", "", "", "", ""],
        "Gemma": ["gemma3-q4_k_m-gguf", "gemma3-bf16-directory", "", "", "", ""],
        "LFM2": ["lfm2moe-q8_0-gguf", "lfm2moe-directory", "", "", "", ""],
        "BERT": ["mean-f32-gguf", "mean-f32-directory", "", "", "", ""],
    }
    readme, models = (ROOT / "README.md").read_text(encoding="utf-8"), _page("models.md")
    table = readme[readme.index("| | GGUF | safetensors |") :].split("\n\n")[0].splitlines()
    assert [cell.split()[0] for cell in table[0].split("|")[2:-1]] == kinds
    rows = {line.split("|")[1].split()[0].strip(","): [cell.split()[0] for cell in line.split("|")[2:-1]] for line in table[2:]}
    assert {name: ["✓" if golden else "" for golden in names] for name, names in goldens.items()} == {
        name: [cell if cell == "✓" else "" for cell in cells] for name, cells in rows.items()
    }
    assert all(f"[{golden}]`" in models for names in goldens.values() for golden in names if golden)


def test_table_of_formats() -> None:
    """Name, weights and bytes per block, bits per weight, and the stored dtype, for every format and no other."""
    rows = re.findall(r"^\| ([A-Z0-9_]+) \| (\d+) \| (\d+) \| ([\d.]+) \| (\w+) \|", _page("formats.md"), re.MULTILINE)
    expected = [
        (f.name, str(f.block_size), str(f.block_bytes), f"{8 * f.block_bytes / f.block_size:g}", f.storage.name)
        for f in FORMATS.values()
    ]
    assert rows == expected


@pytest.mark.slow
def test_rows_of_models_name_tests_that_are_there() -> None:
    """The last cell of each row is the id of a test of this folder, with the parameters it names."""
    rows = [line for line in _page("models.md").splitlines() if re.match(r"\| (?!checkpoint|-)", line)]
    named = [re.search(r"\| `([\w/]+\.py)(::\w+(\[[^]]+\])?)` \|$", row) for row in rows]
    assert len(rows) > 20 and all(named), [row for row, found in zip(rows, named, strict=True) if not found]
    files = sorted({found[1] for found in named if found})
    asked = [sys.executable, "-m", "pytest", "--collect-only", *(f"tests/unit/{file}" for file in files)]
    listed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f"tests/unit/{found[1]}{found[2]}" for found in named if found} <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files, and paths written as code, exist."""
    text = page.read_text(encoding="utf-8")
    targets = [page.parent / link for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text)]
    targets += [ROOT / path for path in re.findall(r"`((?:ferrum_jax|pallas_kernels|tests|benchmarks|docs)/[\w./-]*)`", text)]
    assert [str(target) for target in targets if not target.exists()] == []


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")
