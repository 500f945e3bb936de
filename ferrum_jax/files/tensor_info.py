"""`TensorInfo`: where a tensor of a checkpoint is and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and how to read it.

    `format` is the name of its block format ("Q4_K"). `shape` has the slowest axis first: [rows, columns] or [experts, rows,
    columns], in values, not bytes. `name` is the checkpoint's own name for the tensor (the first of several, such as experts);
    `path` is the file it begins in, at the absolute `offset`; `nbytes` are the bytes as read, without padding. `order`: if the
    columns of a matrix are stored in another order, int32 [columns] (or [experts, columns]) with the format "I32": the column
    of the matrix for each stored column.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    order: TensorInfo | None = None
