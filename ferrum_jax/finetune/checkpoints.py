"""Checkpoints of a training: for each a directory `step-N` with Orbax arrays and a header, complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.json_file import read_object
from ferrum_jax.weights.fresh import flush, fresh

_HEADER, _ARRAYS, _KEPT = "training.json", "state", 2
Values = Sequence[tuple[Any, ...]]


class Checkpoints:
    """Those in `folder` (None: none are kept) of the training with these settings."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder and folder.absolute(), json.loads(json.dumps(settings))

    def save(self, step: int, state: Any, history: Values) -> None:
        """Writes the state after a step, and drops all but the last checkpoints."""
        if self.folder is None:
            return
        import orbax.checkpoint as ocp  # takes a second

        arrays = {f"{number:05d}": np.asarray(array) for number, array in enumerate(jax.tree.leaves(state))}
        path = self.folder / f"step-{step:08d}"
        shutil.rmtree(path, ignore_errors=True)
        with fresh(path, sum(array.nbytes for array in arrays.values())) as partial:
            partial.mkdir()
            with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
                checkpointer.save(partial / _ARRAYS, arrays)
            (partial / _HEADER).write_text(json.dumps({"settings": self.settings, "history": [list(one) for one in history]}))
            flush(partial)  # the name must not reach the disk before the contents
            partial.rename(path)
        for old in self._found()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, state: Any) -> tuple[Any, Values]:
        """The state of the last checkpoint and its history; without one `state` and no history.

        Raises ValueError if it is of another training, ModelFileError if it is damaged."""
        found = self._found()
        if not found:
            return state, []
        import orbax.checkpoint as ocp

        path = found[-1]
        header = read_object(path / _HEADER)
        if header is None or not isinstance(header.get("settings"), dict) or not isinstance(header.get("history"), list):
            raise ModelFileError(f"{path / _HEADER}: is not the header of a checkpoint of a training")
        for name, value in self.settings.items():
            if (known := header["settings"].get(name)) != value:
                raise ValueError(
                    f"{path}: is a checkpoint of another training: its {name} is {known!r}, not {value!r}; give another "
                    "directory or remove it"
                )
        leaves, tree = jax.tree.flatten(state)
        with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
            arrays = checkpointer.restore(path / _ARRAYS)
        stored = [arrays.get(f"{number:05d}") for number in range(len(leaves))]
        if len(arrays) != len(leaves) or any(
            one is None or (one.shape, one.dtype) != (leaf.shape, leaf.dtype) for one, leaf in zip(stored, leaves, strict=True)
        ):
            raise ValueError(f"{path}: is a checkpoint of another training: its arrays are not those of this optimizer")
        put = [jax.device_put(one, leaf.sharding) for one, leaf in zip(stored, leaves, strict=True)]
        return jax.tree.unflatten(tree, put), header["history"]

    def _found(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("step-????????"))
