"""`Keys`: typed access to the keys of a file, and a verdict on those that nothing reads.

The one idea: every key that is read is recorded, so the rest can be judged in one place. A key that the format's own program
does not have counts as absent (`fields`); one that does not affect the computation is ignored by name (`ignore`); one whose
value means "none" has no effect; any other is refused by name (`judge`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError


class Range(NamedTuple):
    """The allowed range of a number: finite, above `low` (or equal to it if `closed`), at most `high`."""

    low: float = 0.0
    high: float = math.inf
    closed: bool = False


# Far beyond any published model, and short of where float32 turns to infinity or NaN.
POSITIVE, AT_LEAST_ZERO = Range(), Range(closed=True)
EPS = Range(1e-30, 0.1, closed=True)
THETA = Range(1.0, 1e12)
FACTOR = Range(0.1, 1e5, closed=True)
ATTENTION_FACTOR = Range(0.01, 100.0, closed=True)
TURNS = Range(0.0, 1e5)  # rotations within a context: YaRN's beta, LLaMA-3.1's frequency factors
SCALE = Range(0.0, 1e4, closed=True)


class Keys:
    """The keys of one file that begin with `prefix` and, where `fields` are given, are among them; every error names the file
    and the key. A value of None counts as absent."""

    def __init__(self, metadata: Mapping[str, object], prefix: str, source: str, fields: Collection[str] | None = None) -> None:
        named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.values = {key: value for key, value in named.items() if fields is None or key in fields}
        self.prefix, self.source, self.fields = prefix, source, fields
        self.asked: set[str] = set()

    def fail(self, key: str, text: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: key {self.prefix + key}: {text}")

    def unsupported(self, key: str, text: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source}: key {self.prefix + key}: {text}")

    def get(self, key: str) -> Any:
        """The value as stored in the file, or None."""
        self.asked.add(key)
        return self.values.get(key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def ignore(self, *keys: str) -> None:
        """Marks keys that do not affect the computation, or not in this model."""
        self.asked.update(keys)

    def unread(self) -> Iterator[tuple[str, object]]:
        """The keys that were not read and whose value does not mean "none", with their values."""
        return ((key, value) for key, value in self.values.items() if key not in self.asked and not is_neutral(value))

    def judge(self, text: str) -> None:
        """Raises UnsupportedModelError for the first `unread` key; `text` may show its value, as {}."""
        for key, value in self.unread():
            raise self.unsupported(key, text.format(shown(value)))

    def integer(self, key: str, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing")
        return self._integer(key, value, low, high)

    def integers(self, key: str, layers: int, *, low: int = 1, high: int = 2**31 - 1) -> tuple[int, ...]:
        """One for each layer: an array of them, or one number for all."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return (self.integer(key, low=low, high=high),) * layers
        if len(value) != layers:
            raise self.fail(key, f"has {len(value)} values; it must have one for each of the {layers} layers")
        return tuple(
            self._integer(key, item, low, high, f"the value of layer {layer} ") for layer, item in enumerate(value.tolist())
        )

    def _integer(self, key: str, value: object, low: int, high: int, where: str = "") -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"{where}must be an integer, not {shown(value)}")
        if not low <= value <= high:
            raise self.fail(key, f"{where}is {shown(value)}; it must be from {low} to {high}")
        return value

    def number(self, key: str, within: Range = POSITIVE) -> float:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, not {shown(value)}")
        low, high, closed = within
        if not (abs(value) < 1e300 and (value >= low if closed else value > low) and value <= high):
            most = "" if high == math.inf else f" and at most {high:g}"
            raise self.fail(key, f"is {shown(value)}; it must be finite and {'at least' if closed else 'above'} {low}{most}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """default: the value if the key is absent; None: the key is required."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {shown(value)}")
        return value


def is_neutral(value: object) -> bool:
    """Whether a value means that something is absent: null, false, 0, empty, "none"."""
    if value is None or isinstance(value, bool | int | float | str):
        return value in (None, False, 0, "", "none")
    return isinstance(value, list | dict) and not value


def shown(value: object) -> str:
    """A value as an error message shows it: short, on one line."""
    if isinstance(value, np.ndarray) or (isinstance(value, list) and len(value) > 8):
        return f"an array of {len(value)} values"
    text = f"an integer of {value.bit_length()} bits" if type(value) is int and abs(value) >= 1 << 64 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
