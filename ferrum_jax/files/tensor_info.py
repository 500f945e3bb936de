"""`TensorInfo`: one tensor of a checkpoint, where it lies and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how to read it.

    `format` is the name of its block format ("Q4_K"). `shape` has the slowest axis first: [rows, columns] or [experts,
    rows, columns], in values, not bytes. `name` is what the checkpoint itself calls the tensor (of several, such as
    experts, the first); `path` is the file it begins in, `offset` absolute in it; `nbytes` is what reading it gives,
    without padding. `order`: where the columns of a matrix lie in another order, int32 [columns] (or [experts, columns])
    under the format "I32": which column of the matrix each stored one is.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    order: TensorInfo | None = None
