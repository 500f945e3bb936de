"""The description of a model for the call of all layers: its parameters, where each layer finds them, what it attends to, and
what all layers share."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.grouped_matmul.parts import Clamp
from pallas_kernels.routing.parts import Router


class Stack(NamedTuple):
    """A parameter of several layers: `array` has the layer axis first, then blocks of `format` in `memory_layout`."""

    array: jax.Array
    format: str
    memory_layout: str


class Part(NamedTuple):
    """A parameter of one layer: the number of its stack, and which item of that stack's first axis it is."""

    stack: int
    item: int


class Attending(NamedTuple):
    """What the attention of one layer reads and writes: the number of its cache, which item of that one's first axis it is, the
    number of its rotation, and the window of paged_attention (0: none)."""

    cache: int
    item: int
    rope: int
    window: int = 0


class Recurring(NamedTuple):
    """What the gated delta net of one layer reads and writes: the number of its state and which item of that one's first axis
    it is; tiled: as in delta_net."""

    state: int
    item: int
    tiled: bool = False


class LayerShape(NamedTuple):
    """What all layers share. router: of the layers that have one; clamp: as in grouped_matmul; gated: each head has, next to
    its query, a gate whose sigmoid multiplies its result. delta_dims: the widths of keys and values of delta nets. kinds:
    how many different values of this there are in the model; if there are several, the other fields describe the first."""

    head_dim: int
    eps: float
    router: Router | None = None
    kinds: int = 1
    clamp: Clamp | None = None
    gated: bool = False
    delta_dims: tuple[int, ...] = ()
