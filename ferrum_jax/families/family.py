"""`Family`: what a family of models is, as one value. Each file of this folder that is named after a family makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ferrum_jax.families.table import Table, Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: its name in GGUF files, and that of its configurations; families that share one share a table.
    model_class: what config.json calls it. tensors: its table. sizes: of the axes in the table, by `sizes(config, spec)`
    with an item of the configuration's `layers` (None: outside of layers)."""

    architecture: str
    model_class: str
    tensors: Table
    sizes: Callable[[Any, Any], Mapping[str, int]]

    def shape(self, tensor: Tensor, config: Any, layer: int | None) -> tuple[int, ...]:
        """The shape of a tensor, of layer `layer` or (None) of the whole model."""
        sizes = self.sizes(config, None if layer is None else config.layers[layer])
        return tuple(sizes[axis] for axis in tensor.axes)
