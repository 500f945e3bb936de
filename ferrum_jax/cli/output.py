"""Prints results: texts from a file as plain text, and facts and tables that fit the terminal.

The one idea: lines break only between words. A number stays with its unit, a path stays whole (the terminal wraps it, so it
can be copied), and columns that do not fit go below their row.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

_LONGEST, _ITEMS = 200, 8  # characters of a text and items of a list that are shown
_STEP = "    "
_LEAST = 24  # columns, at least, to wrap a text to

# Control characters could move the cursor or change the title of the window. Their pictures cannot.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= {code: 0xFFFD for code in range(0x80, 0xA0)}


def harmless(text: str) -> str:
    """A model's text, safe for a terminal: control characters except tab and line feed become visible."""
    return text.translate(_PICTURES)


def plain(value: Any) -> str:
    """A value from a file, of any type, as one line of printable text."""
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{key}: {item}" for key, item in value.items()]
    if isinstance(value, list | tuple):
        value = ", ".join([str(item) for item in value[:_ITEMS]] + ["..."] * (len(value) > _ITEMS))
    text = str(value)
    text = " ".join(text[:_LONGEST].split()) + "..." * (len(text) > _LONGEST)
    return "".join(letter if letter.isprintable() else chr(_PICTURES.get(ord(letter), 0xFFFD)) for letter in text)


def width() -> int | None:
    """The columns of the terminal. None if standard output is not a terminal; then every row is one line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(value: str | Path, columns: int | None, indent: str) -> str:
    """The text in lines of up to `columns` characters, indented after the first. A path stays one line."""
    if isinstance(value, Path) or columns is None:
        return plain_path(value) if isinstance(value, Path) else value
    glued = re.sub(r"(?<=\d) (?=[A-Za-z%])", "\xa0", value)  # 2.0 KiB
    room = max(columns - len(indent), _LEAST)
    lines = textwrap.wrap(glued, room, break_long_words=False, break_on_hyphens=False) or [""]
    return f"\n{indent}".join(lines).replace("\xa0", " ")


def plain_path(path: Path) -> str:
    """A path without control characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(path))


def print_facts(rows: Iterable[tuple[str, str | Path]]) -> None:
    """Prints a name and a value on each line."""
    rows = list(rows)
    indent = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        click.echo(f"{name:<{indent}}{wrapped(value, width(), ' ' * indent)}".rstrip())


def print_table(
    rows: Iterable[Iterable[str | Path]], columns: tuple[str, ...], numbers: tuple[str, ...] = (), labels: bool = True
) -> None:
    """Prints rows below the names of `columns`; the columns in `numbers` are aligned to the right. If the terminal is too
    narrow, the last columns go below each row, with their names if `labels`."""
    table: list[list[str | Path]] = [list(row) for row in rows]
    sizes = [max(len(str(row[i])) for row in [columns, *table]) for i in range(len(columns))]
    terminal = width()
    kept = len(columns)
    while terminal is not None and kept > 1 and sum(sizes[:kept]) + 2 * (kept - 1) > terminal:
        kept -= 1

    def line(row: Iterable[str | Path]) -> str:
        cells = (wrapped(cell, None, "") for cell in row)
        places = zip(cells, sizes[:kept], columns, strict=False)
        return "  ".join(f"{cell:>{size}}" if name in numbers else f"{cell:<{size}}" for cell, size, name in places).rstrip()

    click.echo(line(columns))
    click.echo("─" * (sum(sizes[:kept]) + 2 * (kept - 1)))
    for row in table:
        click.echo(line(row))
        for name, cell in zip(columns[kept:], row[kept:], strict=True):
            label = f"{name}: " if labels and not isinstance(cell, Path) else ""
            if str(cell):
                value = wrapped(label + cell if isinstance(cell, str) else cell, terminal, 2 * _STEP)
                click.echo(_STEP + value)
