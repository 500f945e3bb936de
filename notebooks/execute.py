"""Executes the notebooks and renders them as pages of the site.

    python notebooks/execute.py [NAME ...]   executes these, or all; renders every one
    python notebooks/execute.py --render     renders only: after a change of text

The idea: outputs belong to code. An executed cell carries the digest of its source and
of all code before it, so a notebook whose code was changed afterwards is detected by
comparing digests, without running anything. The first code cell is install.py with the
address of the repository and the range of JAX that pyproject.toml has.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import socket
import sys
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER.parent / "docs" / "notebooks"
ROOTS = "home|root|tmp|var|usr|opt|mnt|work|content|private|Users"
TRACE = re.compile(rf"(?<![\w.:/])/(?:{ROOTS})/[\w./-]+|\b[A-Z]:\\+\w+")
ADDRESS = re.compile(r'(?<=ferrum-jax @ git\+)https://[^"\s]+')  # in pages


def facts() -> dict[str, str]:
    """REPOSITORY, with /OWNER/ in it if it is a placeholder, and JAX."""
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    jax = next(each for each in project["dependencies"] if re.match("jax[<>=]", each))
    return {"REPOSITORY": project["urls"]["Repository"], "JAX": jax[len("jax") :]}


def install_cell() -> str:
    """install.py with these facts."""
    code = (FOLDER / "install.py").read_text(encoding="utf-8").rstrip("\n")
    for name, fact in facts().items():
        code = re.sub(
            f'^{name} = ".*"$', f'{name} = "{fact}"', code, flags=re.MULTILINE
        )
    return code


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digests(notebook: NotebookNode) -> list[str]:
    """For each code cell the digest of its source and all code before it, without
    install.py."""
    digest, found = hashlib.sha256(), [""]
    for cell in code_cells(notebook)[1:]:
        digest.update(cell.source.encode() + b"\0")
        found.append(digest.hexdigest()[:16])
    return found


def faults(notebook: NotebookNode, host: str = "") -> list[str]:
    """Outputs that are stale, failed, or show the machine that they were made on: paths
    and, if given, its name."""
    wrong = []
    cells = zip(code_cells(notebook), digests(notebook), strict=True)
    for number, (cell, digest) in enumerate(cells, 1):
        where = f"code cell {number}"
        executed = cell.metadata.get("executed", ""), cell.execution_count
        if executed != (digest, number):
            wrong.append(f"{where} was changed after it was executed")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                wrong.append(f"{where} has an error or a warning")
            traces = TRACE.findall(text_of(output))
            traces += (
                re.findall(rf"\b{re.escape(host)}\b", text_of(output)) if host else []
            )
            wrong += [f"{where} shows the machine: {each}" for each in traces]
    return wrong


def execute(notebook: NotebookNode) -> None:
    """Runs all cells and keeps their outputs, but none of a cell tagged no-output, such
    as one that prints speeds. Standard error is printed and not kept."""
    os.environ["FERRUM_JAX_PROGRESS"] = "0"  # a line that disappears is not an output
    before, folder = notebook.metadata.copy(), {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, resources=folder, record_timing=False).execute()
    notebook.metadata = before
    for cell, digest in zip(code_cells(notebook), digests(notebook), strict=True):
        tags = cell.metadata.get("tags", [])
        kept = {"executed": digest, "tags": tags}
        cell.metadata = NotebookNode({key: kept[key] for key in kept if kept[key]})
        joined: list[NotebookNode] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                print(output.text, end="", file=sys.stderr)
            elif joined and joined[-1].output_type == output.output_type == "stream":
                joined[-1].text += output.text
            else:
                joined.append(output)
        cell.outputs = [] if "no-output" in tags else joined


def page(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown without install.py, and its pictures by their paths."""
    parts, pictures, install = [], {}, code_cells(notebook)[0]
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        if cell is install:
            parts.append(origin(name))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for place, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                path = f"{name}_files/{name}_{number}_{place}.png"
                pictures[path] = base64.b64decode(output.data["image/png"])
                parts.append(f"![What the code above draws]({path})")
            elif text := text_of(output).strip("\n"):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures


def origin(name: str) -> str:
    """Where the notebook of a page is, and how to open it in Colab."""
    text = (
        f"This page is `notebooks/{name}.ipynb` with its outputs. Its first cell, "
        "left out here, installs the package where it is missing."
    )
    site, _, repository = facts()["REPOSITORY"].partition("github.com/")
    if not site or repository.startswith("OWNER/"):
        return text
    colab = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks"
    return f"{text} [Open it in Colab]({colab}/{name}.ipynb)."


def text_of(output: NotebookNode) -> str:
    """The text of an output."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def main() -> None:
    """Writes each notebook and its page, but no output that may not be kept."""
    parser = argparse.ArgumentParser(usage=f"\n{__doc__}")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--render", action="store_true")
    asked, wrong = parser.parse_args(), []
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        code_cells(notebook)[0].source = install_cell()
        if not asked.render and (not asked.names or path.stem in asked.names):
            print(f"executing {path.name}", file=sys.stderr)
            execute(notebook)
        if found := faults(notebook, socket.gethostname()):
            wrong += [f"{path.name}: {each}" for each in found]
            continue
        nbformat.write(notebook, path)
        text, pictures = page(notebook, path.stem)
        for old in (PAGES / f"{path.stem}_files").glob("*"):
            old.unlink()
        for name, content in {f"{path.stem}.md": text.encode(), **pictures}.items():
            (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
            (PAGES / name).write_bytes(content)
    for path in PAGES.parent.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(ADDRESS.sub(facts()["REPOSITORY"], text), encoding="utf-8")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
