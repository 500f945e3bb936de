"""The notebooks as files: without outputs, one way to install, rendered copies that have their code. tests/real runs them."""

import contextlib
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_quickstart", "02_inside_the_moe", "03_kernels", "04_serving"]


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_all_four_install_alike():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    assert len({code_of(path)[0] for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_the_rendered_copy_is_of_this_notebook(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    rendered = (ROOT / "docs" / "notebooks" / f"{path.stem}.md").read_text(encoding="utf-8")
    for code in code_of(path):
        assert f"```python\n{code}\n```".replace(";", "") in rendered.replace(";", "")  # those at the end are not rendered
    assert "Traceback" not in rendered and str(Path.home()) not in rendered


def installed(folder: Path, monkeypatch, **environment: str) -> list[list[str]]:
    """The commands that the install cell runs in a folder, where the package is not installed."""
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.delenv("FERRUM_JAX_GIT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.chdir(folder):
        exec(code_of(NOTEBOOKS[0])[0], {})
    return commands


def test_install_cell(tmp_path, monkeypatch):
    """From the checkout it lies in; else from a git address; nothing where the package is there."""
    for folder in (ROOT, ROOT / "notebooks"):
        [command] = installed(folder, monkeypatch)
        assert command[1:] == ["-m", "pip", "install", "--quiet", f"{ROOT}[plot]"]
    [command] = installed(tmp_path, monkeypatch, FERRUM_JAX_GIT="git+https://example.org/ferrum_jax")
    assert command[-1] == "ferrum-jax[plot] @ git+https://example.org/ferrum_jax"
    with pytest.raises(SystemExit, match="FERRUM_JAX_GIT"):
        installed(tmp_path, monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    exec(code_of(NOTEBOOKS[0])[0], {})
