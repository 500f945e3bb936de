"""Reads the JSON files of checkpoint directories without trusting them: bounded size, no repeated keys, no NaN; every error
names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files import open_regular

MAX_BYTES = 64 << 20  # the largest tokenizer.json in use have about 40 MiB


def read_text(path: Path) -> str | None:
    """The text of a small file; None if it does not exist. ModelFileError if it is too large or not UTF-8 text."""
    try:
        file, status = open_regular(path, path.suffix)
    except FileNotFoundError:
        return None
    with file:
        if status.st_size > MAX_BYTES:
            raise ModelFileError(f"{path}: has {status.st_size} bytes; at most {MAX_BYTES} are allowed")
        raw = os.pread(file.fileno(), MAX_BYTES, 0)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: is not valid UTF-8 at byte {error.start}") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file does not exist. ModelFileError for anything but an object."""
    text = read_text(path)
    return None if text is None else parse_object(text, str(path))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parses a text that is a JSON object; every ModelFileError begins with `where`."""
    return _parse(text, where, dict, "object")


def parse_array(text: str | bytes, where: str) -> list[Any]:
    """Parses a text that is a JSON array; every ModelFileError begins with `where`."""
    return _parse(text, where, list, "array")


def _parse(text: str | bytes, where: str, kind: type, called: str) -> Any:

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelFileError(f"{where}: key {twice!r} appears twice; each key must be there once")
        return made

    def refuse(constant: str) -> Any:
        raise ModelFileError(f"{where}: {constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        head = text[:60] if isinstance(text, str) else bytes(text[:60])
        raise ModelFileError(f"{where}: is not valid JSON ({error or 'nested too deeply'}): it begins with {head!r}") from None
    if not isinstance(value, kind):
        raise ModelFileError(f"{where}: must be a JSON {called}, not {type(value).__name__}")
    return value
