"""Every cell of every notebook runs, as on a machine without an accelerator, and shows what its kept outputs are of."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows: "stdout", types of data such as "image/png"."""
    return {kind for output in cell.outputs for kind in ([output.name] if "name" in output else output.data)} - {"stderr"}


@pytest.mark.real
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRUM_JAX_PROGRESS", "0")  # a line that comes and goes is not an output
    kept, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures
    stored = [cell for cell in kept.cells if cell.cell_type == "code"]
    checked = [number for number, cell in enumerate(stored) if "no-output" not in cell.metadata.get("tags", [])]
    assert [kinds(cells[number]) for number in checked] == [kinds(stored[number]) for number in checked]
