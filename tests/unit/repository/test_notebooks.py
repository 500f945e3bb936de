"""The notebooks as files: outputs of the code they hold, pages made from them, one way to install. tests/real runs them."""

import contextlib
import copy
import importlib.util
import shutil
import struct
import subprocess
from importlib import metadata
from types import SimpleNamespace

import nbformat
import pytest

from support import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_quickstart", "02_inside_the_moe", "03_kernels", "04_serving", "05_finetune"]
_spec = importlib.util.spec_from_file_location("notebooks_execute", ROOT / "notebooks" / "execute.py")
assert _spec and _spec.loader
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_the_code_that_the_cells_hold(name):
    assert [path.stem for path in NOTEBOOKS] == NAMES
    notebook = read(name)
    assert execute.faults(notebook) == [], "python notebooks/execute.py makes them anew"
    cells = execute.code_cells(notebook)
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 3, "outputs are kept"
    assert cells[0].source == execute.install_cell(), "python notebooks/execute.py --render puts it in"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_rendered_from_the_notebook(name):
    text, pictures = execute.page(read(name), name)
    pages = ROOT / "docs" / "notebooks"
    assert (pages / f"{name}.md").read_text(encoding="utf-8") == text, "python notebooks/execute.py --render"
    found = {f"{name}_files/{path.name}": path.read_bytes() for path in (pages / f"{name}_files").iterdir()}
    assert found == pictures and pictures
    for picture in pictures.values():
        width, height = struct.unpack(">II", picture[16:24])
        assert len(picture) < 120_000 and width < 900 and height < 900


def test_a_change_of_code_makes_all_later_outputs_stale():
    notebook = read(NAMES[0])
    notebook.cells[0].source += " Text."
    assert execute.faults(notebook) == []
    cells = execute.code_cells(notebook)
    cells[2].source += "  # changed"
    assert [fault.split()[2] for fault in execute.faults(notebook)] == [str(n) for n in range(3, len(cells) + 1)]


@pytest.mark.parametrize(
    "trace", [*(f"/{folder}/a/x.py" for folder in ("home", "tmp", "root", "Users")), "C:\\Users\\me", "my-laptop"]
)
def test_a_path_of_a_machine_is_found_in_outputs(trace):
    notebook = copy.deepcopy(read(NAMES[0]))
    execute.code_cells(notebook)[1].outputs = [nbformat.v4.new_output("stream", text=f"loaded {trace} in 3 s")]
    assert len(execute.faults(notebook, host="my-laptop")) == 1
    execute.code_cells(notebook)[1].outputs[0].text = "my-laptops, 12 tokens/s, https://example.org/home/page, a/tmp/b, 3 /work"
    assert execute.faults(notebook, host="my-laptop") == []


def test_the_address_is_in_one_place():
    """What repeats it has it from pyproject.toml."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = [address for page in pages for address in execute.ADDRESS.findall(page.read_text(encoding="utf-8"))]
    code = {line for name in NAMES for line in execute.code_cells(read(name))[0].source.splitlines() if "REPOSITORY =" in line}
    address = execute.facts()["REPOSITORY"]
    assert set(found) == {address} and code == {f'REPOSITORY = "{address}"'}


def test_a_page_leads_to_colab_once_there_is_an_address(monkeypatch):
    assert "colab" not in execute.origin("x")
    monkeypatch.setattr(execute, "facts", lambda: {"REPOSITORY": "https://github.com/someone/ferrum_jax", "JAX": ""})
    place = "https://colab.research.google.com/github/someone/ferrum_jax/blob/main/notebooks/x.ipynb"
    assert f"]({place})" in execute.origin("x")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """The install cell in a folder, with these versions installed: the requirements that pip is given."""

    def run(folder=tmp_path, address="OWNER", gpu=False, **versions):
        commands: list[list[str]] = []
        packages = [SimpleNamespace(name=name.replace("_", "-"), version=version) for name, version in versions.items()]
        monkeypatch.setattr(metadata, "distributions", lambda: packages)
        monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu and name == "nvidia-smi" else None)
        with contextlib.chdir(folder):
            exec(execute.install_cell().replace("OWNER/ferrum_jax", f"{address}/ferrum_jax"), {})
        assert all(command[1:5] == ["-m", "pip", "install", "--quiet"] for command in commands)
        return [requirement for command in commands for requirement in command[5:]]

    monkeypatch.delenv("FERRUM_JAX_GIT", raising=False)
    return run


def test_install_from_a_checkout_around_or_next_to_the_notebook(install, tmp_path):
    assert install(ROOT) == install(ROOT / "notebooks") == [f"{ROOT}[finetune,plot,serve]"]
    clone = tmp_path / "clone"
    (clone / "ferrum_jax").mkdir(parents=True)
    (clone / "ferrum_jax" / "loading.py").touch()
    assert install() == [f"{clone}[finetune,plot,serve]"]
    assert install(ferrum_jax="0.1.0") == []


def test_install_from_the_address(install, monkeypatch):
    assert install(address="someone") == ["ferrum-jax[finetune,plot,serve] @ git+https://github.com/someone/ferrum_jax"]
    monkeypatch.setenv("FERRUM_JAX_GIT", "git+https://example.org/ferrum_jax")
    assert install() == ["ferrum-jax[finetune,plot,serve] @ git+https://example.org/ferrum_jax"]


def test_without_a_source_one_line_says_what_to_do(install):
    with pytest.raises(Exception, match="FERRUM_JAX_GIT") as caught:
        install()
    assert caught.value._render_traceback_() == [str(caught.value)] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "more"),
    [
        ({"jax": "0.10.2", "gpu": True}, []),
        ({"jax": "0.12.0.1", "libtpu": "0.0.52"}, []),
        ({"jax": "0.7.2", "gpu": True}, ["jax[cuda12]"]),
        ({"jax": "0.7.2", "libtpu": "0.0.17"}, ["jax[tpu]"]),
        ({"jax": "0.13.0"}, []),
        ({}, []),
    ],
)
def test_a_jax_out_of_range_is_replaced_by_one_for_the_device(install, facts, more):
    assert install(address="someone", **facts)[1:] == more
