"""Metadata with their GGUF types, so that a checkpoint can be written as a GGUF file again without changing a key.

Values alone do not tell their types (an `int` may be a uint32 or an int64), and llama.cpp refuses a key whose type it does not
expect. A source of GGUF metadata has the types; for other sources the family states them (`Family.to_gguf`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float32", "float64")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (*INTEGERS, *FLOATS, "bool")}


class Typed(NamedTuple):
    """A value as in `GGUFFile.metadata`, and its type: INTEGERS, FLOATS, "bool", "string", or "array " and one of them."""

    value: object
    kind: str

    @property
    def element(self) -> str:
        """The type of an array's elements; "" for a scalar."""
        return self.kind.partition(" ")[2]


def plain(typed: Mapping[str, Typed]) -> dict[str, object]:
    return {key: entry.value for key, entry in typed.items()}


def to_json(typed: Mapping[str, Typed]) -> dict[str, list]:
    """{key: [type, value]}; floats in hexadecimal and arrays of numbers in base64, so that all bits are kept."""

    def value_of(entry: Typed) -> Any:
        if isinstance(entry.value, np.ndarray):
            return base64.b64encode(entry.value.astype(_DTYPES[entry.element]).tobytes()).decode()
        return entry.value.hex() if isinstance(entry.value, float) else entry.value

    return {key: [entry.kind, value_of(entry)] for key, entry in typed.items()}


def from_json(entries: Mapping[str, list]) -> dict[str, Typed]:
    """The inverse. ValueError, TypeError or KeyError for damaged input."""
    return {key: Typed(_from_json(kind, value), kind) for key, (kind, value) in entries.items()}


def _from_json(kind: str, value: Any) -> Any:
    if kind in FLOATS:
        return float.fromhex(value)
    if kind.startswith("array ") and kind != "array string":
        return np.frombuffer(base64.b64decode(value, validate=True), _DTYPES[kind.removeprefix("array ")]).copy()
    expected = {"array string": list, "string": str, "bool": bool} | dict.fromkeys(INTEGERS, int)
    if type(value) is not expected[kind] or (isinstance(value, list) and not set(map(type, value)) <= {str}):
        raise ValueError(f"{str(value)[:60]!r} is not {kind}")
    return value
