"""What the call of all layers is told of a model: its parameters, where each layer has them, and what all layers share."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Stack(NamedTuple):
    """A parameter of several layers: `array` has the layers first, then blocks of `format` in `memory_layout`."""

    array: jax.Array
    format: str
    memory_layout: str


class Part(NamedTuple):
    """A parameter of one layer: the number of its stack, and which item of that stack's first axis it is."""

    stack: int
    item: int


class LayerShape(NamedTuple):
    """What all layers share. window, scales and normalize: as in paged_attention and routing. kinds: of how many kinds the
    layers are, formats apart; more than one, and the rest is of the first."""

    head_dim: int
    eps: float
    window: int = 0
    top_k: int = 0
    normalize: bool = True
    expert_scale: float = 1.0
    kinds: int = 1
