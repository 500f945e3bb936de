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
    """How these layers, a tree of `LayerStack`s, are scanned; each run is one body. specs: one for each layer; layers share a
    body only if they are equal."""
    stacks = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, LayerStack))
    return segments(list(zip(*(stack.formats for stack in stacks), *([specs] if specs else []), strict=True)))


def scan_layers(
    layers: Mapping[str, Any], step: Callable[[Any, Layer], Any], carry: Any, specs: Sequence[Hashable] = ()
) -> Any:
    """`carry = step(carry, layer)` for every layer in turn, each distinct body traced once; specs as in `layer_segments`."""
    for segment in layer_segments(layers, specs):

        def period(carry: Any, number: Any, segment: Segment = segment) -> Any:
            first = segment.start
            for length in segment.runs:

                def body(carry: Any, inner: Any, first: int = first) -> Any:
                    return step(carry, Layer(first, ((segment.period, number), (1, inner))))

                carry = _scan(body, carry, length)
                first += length
            return carry

        carry = _scan(period, carry, segment.repeats)
    return carry


def _scan(body: Callable[[Any, Any], Any], carry: Any, count: int) -> Any:
    """`carry = body(carry, number)` for each number below `count`."""
    if count == 1:
        return body(carry, 0)
    return lax.scan(lambda carry, number: (body(carry, number), None), carry, jnp.arange(count, dtype=jnp.int32))[0]
