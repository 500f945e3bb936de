"""The tensor table of a family: for each tensor its names, parameter and axes, the layers that have it, and what loading does.

The one idea: a column says one thing, so that placing, checking, converting, merging and quantizing follow from the table, and
no other file has to know which family it handles.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Path = tuple[str, ...]
GgufRows = Callable[[Any, int], np.ndarray]
_NUMBER = r"(0|[1-9][0-9]{0,3})"
_IN_LAYER = re.compile(rf"blk\.{_NUMBER}\.(.+)")
_EXPERT = re.compile(r"\.(0|[1-9][0-9]{0,4})(?=\.)")


def every_layer(spec: Any) -> bool:
    """For tensors that all layers have."""
    return True


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the equal parts that each expert's rows in the tensor `tensor` [experts, rows, columns] or [experts, rows] of a
    directory are cut into. `index` says which; the table's rows that name the tensor say how many there are. interleaved: rows
    of the parts lie in turn, not one part after the other. rows_last: the tensor is [experts, columns, rows]. whole: it is one
    tensor, not one of each expert."""

    tensor: str
    index: int = 0
    interleaved: bool = False
    rows_last: bool = False
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Change:
    """The tensor `tensor` of a directory, or of some GGUF files, where it is not as GGUF files have it; it is changed while it
    is read.

    rows, columns: by the `LayerSpec`, int arrays of which row or column of the tensor each one is, where they are others
    (None: the same); rows of several experts count through. matrices: by the `LayerSpec`, the number of matrices that these
    rows are of, one after the other, where there is an axis for them; turned: each of them is transposed. values: of each
    number the one that GGUF files have, which then is in F32, be it the same.
    """

    tensor: str
    rows: Callable[[Any], np.ndarray] | None = None
    columns: Callable[[Any], np.ndarray] | None = None
    values: Callable[[np.ndarray], np.ndarray] | None = None
    matrices: Callable[[Any], int] | None = None
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of the table.

    name: its name in GGUF files; for a layer's tensor the part after `blk.N.`. path: of the parameter. axes: the names of its
    dimensions, slowest first; `Family.sizes` gives their sizes. modules: the names of its module in directories; for a layer's
    tensor the part after the layer's number, with `*` for the number of an expert. Errors show the first one.
    A `Part` or a `Change` names a tensor with its suffix.

    layers(spec): whether a layer has it, given its item of the configuration's `layers`; a tensor outside the layers is there
    if this is so of any. optional: whether it may be missing, in all of these layers together. ignored(spec): whether a layer
    that does not have it may still have it in files; it is not read.

    gguf_rows: if GGUF files keep the rows in another order, `gguf_rows(spec, rows)` int [rows] gives for each row of the
    parameter its row in the file. quantize: whether `quantize=` changes it and GGUF files may hold it in a format other than
    F32 (vectors always stay F32). not_in_gguf: why llama.cpp cannot read it, if it cannot. elsewhere: the tensor of a layer
    that has its rows in some GGUF files; all that share it have all of its rows.
    """

    name: str
    path: Path
    axes: tuple[str, ...]
    modules: tuple[str | Part | Change, ...] = ()
    layers: Callable[[Any], bool] = every_layer
    optional: bool = False
    ignored: Callable[[Any], bool] | None = None
    gguf_rows: GgufRows | None = None
    quantize: bool = True
    not_in_gguf: str = ""
    elsewhere: Change | None = None

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_projection(self) -> bool:
        """Whether it is a single matrix of weights, to which adapters can be added."""
        return len(self.axes) == 2 and self.quantize


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of a family: those that a model has once, and those of its layers. prefix: the beginning of the names of a
    layer's modules in directories; other_prefix: the same in some of them. ignored: a regular expression for tensors in
    directories that are not needed; passed_over: for those of parts of the model that are not run."""

    whole: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]
    prefix: str
    ignored: str
    passed_over: str = ""
    other_prefix: str = ""

    def find(self, name: str) -> tuple[Tensor | None, int | None]:
        """The row of the table for the tensor that GGUF files call `name`, and the number of its layer."""
        match = _IN_LAYER.fullmatch(name)
        return (self._of_layer.get(match[2]), int(match[1])) if match else (self._of_whole.get(name), None)

    def at(self, path: Path) -> Tensor | None:
        """The row of the table for a parameter."""
        return next((tensor for tensor in (*self.whole, *self.layer) if tensor.path == path), None)

    def locate(self, module: str) -> tuple[str, int]:
        """For a module of a directory: the stem of its GGUF name ("" for none) and its expert (-1 for none)."""
        layer, inside = self._inside(module)
        if layer is None:
            return self._stems[0].get(inside, ""), -1
        expert = None if inside in self._stems[1] else _EXPERT.search(inside)
        stem = self._stems[1].get(_EXPERT.sub(".*", inside, count=1) if expert else inside)
        return (f"blk.{layer}.{stem}", int(expert[1]) if expert else -1) if stem else ("", -1)

    def parts(self, module: str) -> dict[str, list[tuple[str, Part]]] | None:
        """For a module of a directory that holds all experts of a layer: the GGUF names of the parts of its tensors, in order,
        and the parts, by suffix. None for any other module."""
        layer, inside = self._inside(module)
        if layer is None or inside not in self._parts:
            return None
        known = self._parts[inside].items()
        return {suffix: [(f"blk.{layer}.{name}", part) for name, part in members] for suffix, members in known}

    def changes(self, name: str) -> tuple[list[tuple[str, Tensor, Change]], int | None]:
        """What becomes of a tensor of a directory that is changed while it is read: GGUF names, rows of the table and changes,
        and the number of its layer."""
        layer, inside = self._inside(name)
        lead = "" if layer is None else f"blk.{layer}."
        changes = self._changes[layer is not None].get(inside, [])
        return [(lead + tensor.name, tensor, change) for tensor, change in changes], None if layer is None else int(layer)

    def held(self, name: str) -> tuple[list[tuple[str, Tensor, Change]], int | None]:
        """What a tensor of some GGUF files holds: GGUF names, rows of the table and changes, and the number of its layer."""
        match = _IN_LAYER.fullmatch(name)
        if not match or match[2] not in self._held:
            return [], None
        return [(f"blk.{match[1]}.{row.name}", row, change) for row, change in self._held[match[2]]], int(match[1])

    def own_name(self, name: str) -> str:
        """The name in directories of the tensor that GGUF files call `name`, with `*` for the number of an expert."""
        match = _IN_LAYER.fullmatch(name)
        stem, _, suffix = (match[2] if match else name).rpartition(".")
        module = next((own for own, known in self._stems[bool(match)].items() if known == stem), "")
        row, _ = self.find(name)
        parts = [part.tensor for part in row.modules if isinstance(part, Part | Change)] if row else []
        own = parts[0] if parts and not module else f"{module or stem}.{suffix}"
        return f"{self.prefix}{match[1]}.{own}" if match else own

    def biased(self, *, always: bool = False) -> set[str]:
        """The stems of a layer's matrices that have a bias in some models, or (`always`) in all of them."""
        matrices = {tensor.stem for tensor in self.layer if tensor.is_projection}
        biases = {tensor.stem for tensor in self.layer if tensor.name.endswith(".bias") and not (always and tensor.optional)}
        return biases & matrices

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a module or tensor of a directory belongs to."""
        layer, _ = self._inside(name)
        return None if layer is None else int(layer)

    def _inside(self, module: str) -> tuple[str | None, str]:
        for prefix in filter(None, (self.prefix, self.other_prefix)):
            if match := re.fullmatch(re.escape(prefix) + _NUMBER + r"\.(.+)", module):
                return match[1], match[2]
        return None, module

    @functools.cached_property
    def _of_whole(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.whole}

    @functools.cached_property
    def _of_layer(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.layer}

    @functools.cached_property
    def _held(self) -> dict[str, list[tuple[Tensor, Change]]]:
        """Tensors that a tensor of some GGUF files holds, by its name in a layer."""
        found: dict[str, list[tuple[Tensor, Change]]] = {}
        for tensor in self.layer:
            if tensor.elsewhere:
                found.setdefault(tensor.elsewhere.tensor, []).append((tensor, tensor.elsewhere))
        return found

    @functools.cached_property
    def _stems(self) -> tuple[dict[str, str], dict[str, str]]:
        """Stems of GGUF names by module of a directory: for the whole model, and for a layer."""

        def stems(tensors: tuple[Tensor, ...]) -> dict[str, str]:
            return {module: tensor.stem for tensor in tensors for module in tensor.modules if isinstance(module, str)}

        return stems(self.whole), stems(self.layer)

    @functools.cached_property
    def _changes(self) -> tuple[dict[str, list[tuple[Tensor, Change]]], dict[str, list[tuple[Tensor, Change]]]]:
        """Tensors that are changed by the names of directories: of the whole model, of a layer."""

        def changes(tensors: tuple[Tensor, ...]) -> dict[str, list[tuple[Tensor, Change]]]:
            found: dict[str, list[tuple[Tensor, Change]]] = {}
            for tensor in tensors:
                for module in tensor.modules:
                    if isinstance(module, Change):
                        found.setdefault(module.tensor, []).append((tensor, module))
            return found

        return changes(self.whole), changes(self.layer)

    @functools.cached_property
    def _parts(self) -> dict[str, dict[str, list[tuple[str, Part]]]]:
        """The GGUF names of the parts of each tensor of a directory, in order, and the parts, by its module and suffix."""
        parts = [(part, tensor.name) for tensor in self.layer for part in tensor.modules if isinstance(part, Part)]
        found: dict[str, dict[str, list[tuple[str, Part]]]] = {}
        for part, name in sorted(parts, key=lambda known: known[0].index):
            module, _, suffix = part.tensor.rpartition(".")
            found.setdefault(module, {}).setdefault(suffix, []).append((name, part))
        return found
