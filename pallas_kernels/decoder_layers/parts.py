"""The description of a model for the call of all layers: its parameters, where each layer finds them, and what all layers
share."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.grouped_matmul import Clamp


class Stack(NamedTuple):
    """A parameter of several layers: `array` has the layer axis first, then blocks of `format` in `memory_layout`."""

    array: jax.Array
    format: str
    memory_layout: str


class Part(NamedTuple):
    """A parameter of one layer: the number of its stack, and which item of that stack's first axis it is."""

    stack: int
    item: int


class LayerShape(NamedTuple):
    """What all layers share. window, scales and normalize: as in paged_attention and routing; clamp: as in grouped_matmul.
    kinds: the number of different kinds of layers, apart from formats; if there are several, the other fields describe the
    first."""

    head_dim: int
    eps: float
    window: int = 0
    top_k: int = 0
    normalize: bool = True
    expert_scale: float = 1.0
    kinds: int = 1
    clamp: Clamp | None = None
