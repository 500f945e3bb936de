"""Layers as scans over the segments that repeat: each distinct body is traced and compiled once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.models.segments import Segment, segments
from ferrum_jax.quantized import Layer, LayerStack


def layer_segments(layers: Mapping[str, Any], specs: Sequence[Hashable] = ()) -> tuple[Segment, ...]:
    """How these layers, a tree of `LayerStack`s, are scanned; the sum of the periods is the number of distinct bodies. specs:
    what else layers with one body have in common, one for each."""
    stacks = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, LayerStack))
    return segments(list(zip(*(stack.formats for stack in stacks), *([specs] if specs else []), strict=True)))


def scan_layers(
    layers: Mapping[str, Any], step: Callable[[Any, Layer], Any], carry: Any, specs: Sequence[Hashable] = ()
) -> Any:
    """`carry = step(carry, layer)` for every layer in turn, each distinct body traced once; specs as of `layer_segments`."""
    for segment in layer_segments(layers, specs):

        def body(carry: Any, number: jax.Array | int, segment: Segment = segment) -> tuple[Any, None]:
            for offset in range(segment.period):
                carry = step(carry, Layer(segment.start + offset, segment.period, number))
            return carry, None

        if segment.repeats == 1:
            carry, _ = body(carry, 0)
        else:
            carry, _ = lax.scan(body, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
    return carry
