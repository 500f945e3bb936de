"""Layers as scans over the segments that repeat: each distinct body is traced and compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.models.segments import Segment, segments
from ferrum_jax.quantized import Layer, LayerStack


def layer_segments(layers: Mapping[str, Any]) -> tuple[Segment, ...]:
    """How these layers, a tree of `LayerStack`s, are scanned; the sum of the periods is the number of distinct bodies."""
    stacks = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, LayerStack))
    return segments(list(zip(*(stack.formats for stack in stacks), strict=True)))


def scan_layers(layers: Mapping[str, Any], step: Callable[[Any, Layer], Any], carry: Any) -> Any:
    """`carry = step(carry, layer)` for every layer in turn, each distinct body traced once."""
    for segment in layer_segments(layers):

        def body(carry, number, segment=segment):
            for offset in range(segment.period):
                carry = step(carry, Layer(segment.start + offset, segment.period, number))
            return carry, None

        if segment.repeats == 1:
            carry, _ = body(carry, 0)
        else:
            carry, _ = lax.scan(body, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
    return carry
