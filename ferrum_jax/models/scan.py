"""Layers as scans over the segments that repeat: each distinct body is traced and compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.models.segments import Segment, segments
from ferrum_jax.quantized import Layer, LayerStack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sliced:
    """Arrays of layers of which a scan hands out each layer's own, so that their derivatives are stacked as they come.

    labels: one for each layer, "" for one without such arrays; groups[label]: a tree of arrays, the layers with that label in
    order on the first axis.
    """

    groups: dict[str, Any]
    labels: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def of_run(self, segment: Segment, first: int, length: int) -> Any:
        """The arrays of the `length` layers from `first` on and of the same layers in each repeat of the segment: [repeats,
        length, ...]; None if they have none."""
        label = self.labels[first]
        if not label:
            return None
        before = self.labels[: segment.start].count(label)
        offset = self.labels[segment.start : first].count(label)
        period = self.labels[segment.start : segment.start + segment.period].count(label)

        def cut(array: jax.Array) -> jax.Array:
            every = array[before : before + segment.repeats * period]
            return every.reshape(segment.repeats, period, *array.shape[1:])[:, offset : offset + length]

        return jax.tree.map(cut, self.groups[label])


def layer_segments(layers: Mapping[str, Any], specs: Sequence[Hashable] = ()) -> tuple[Segment, ...]:
    """How these layers, a tree of `LayerStack`s, are scanned; each run is one body. specs: one for each layer; layers share a
    body only if they are equal."""
    stacks = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, LayerStack))
    return segments(list(zip(*(stack.formats for stack in stacks), *([specs] if specs else []), strict=True)))


def scan_layers(
    layers: Mapping[str, Any], step: Callable[[Any, Layer], Any], carry: Any, specs: Sequence[Hashable] = ()
) -> Any:
    """`carry = step(carry, layer)` for every layer in turn, each distinct body traced once; specs as in `layer_segments`."""
    return scan_sliced(layers, {}, lambda carry, layer, _: step(carry, layer), carry, specs)


def scan_sliced(
    layers: Mapping[str, Any],
    sliced: Mapping[str, Sliced],
    step: Callable[[Any, Layer, Any], Any],
    carry: Any,
    specs: Sequence[Hashable],
) -> Any:
    """`carry = step(carry, layer, own)` for every layer in turn; own: the layer's arrays by the names in `sliced`, None for
    those that it does not have."""
    if sliced:
        specs = list(zip(specs, *(arrays.labels for arrays in sliced.values()), strict=True))
    for segment in layer_segments(layers, specs):
        starts = [segment.start + sum(segment.runs[:run]) for run in range(len(segment.runs))]
        runs = list(zip(starts, segment.runs, strict=True))
        of_runs = [{name: arrays.of_run(segment, *run) for name, arrays in sliced.items()} for run in runs]

        def period(carry: Any, number: Any, parts: Any, segment: Segment = segment, runs: Any = runs) -> Any:
            for (first, length), part in zip(runs, parts, strict=True):

                def body(carry: Any, inner: Any, own: Any, first: int = first) -> Any:
                    return step(carry, Layer(first, ((segment.period, number), (1, inner))), own)

                carry = _scan(body, carry, length, part)
            return carry

        carry = _scan(period, carry, segment.repeats, of_runs)
    return carry


def _scan(body: Callable[[Any, Any, Any], Any], carry: Any, count: int, parts: Any) -> Any:
    """`carry = body(carry, number, parts at number)` for each number below `count`."""
    if count == 1:
        return body(carry, 0, jax.tree.map(lambda array: array[0], parts))

    def step(carry: Any, each: Any) -> tuple[Any, None]:
        return body(carry, *each), None

    return lax.scan(step, carry, (jnp.arange(count, dtype=jnp.int32), parts))[0]
