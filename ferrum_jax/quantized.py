"""Compressed tensors as pytrees, and `linear` and `grouped_linear`, the one way from the model into the kernels.

A `QuantizedTensor` is one array of stored blocks and, static beside it, the name of their format. Layers of a model are
stacked; where a file mixes formats, a `LayerStack` holds one stack for each format and knows in which of them each layer
is. Nobody slices a layer out: a `Layer` travels to the operation, which reads the blocks where they are.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax import export

from pallas_kernels.blocks import FORMATS
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized_matmul import quantized_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """Matrices [*stack, rows, columns] in blocks of `format` along the columns.

    `stored` [*stack, rows, stored width], of the dtype `FORMATS[format].storage`.
    """

    stored: jax.Array
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[*stack, rows, columns], in weights."""
        form = FORMATS[self.format]
        blocks = self.stored.shape[-1] * form.storage.itemsize // form.block_bytes
        return (*self.stored.shape[:-1], blocks * form.block_size)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` [tokens] of a matrix without stack axes, unpacked: float32 [tokens, columns]."""
        return FORMATS[self.format].decode(self.stored[ids])


@dataclasses.dataclass(frozen=True)
class Layer:
    """Layer number `first + step * period`: `first` and `period` are known while tracing, `step` may be a scan's counter.

    Within one scan the layers at the same place of each period have the same formats.
    """

    first: int
    period: int = 0
    step: jax.Array | int = 0

    @property
    def number(self) -> jax.Array | int:
        return self.first + self.step * self.period


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStack:
    """One parameter of all layers. `layout[l]` names the format of layer l ("" where the layer has no such parameter);
    `stacks[format]` holds the layers of that format in order, layer axis first."""

    stacks: dict[str, QuantizedTensor]
    layout: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def has(self, layer: Layer) -> bool:
        return bool(self.layout[layer.first])

    def select(self, layer: Layer) -> tuple[QuantizedTensor, jax.Array | int]:
        """The stack that holds the layer, and the layer's place in it."""
        format = self.layout[layer.first]
        place: jax.Array | int = self.layout[: layer.first].count(format)
        if layer.period:
            place = place + layer.step * self.layout[layer.first : layer.first + layer.period].count(format)
        return self.stacks[format], place

    def vector(self, layer: Layer) -> jax.Array:
        """The layer's parameter as float32, for one stored as plain numbers (norms, biases): [columns]."""
        tensor, place = self.select(layer)
        return FORMATS[tensor.format].decode(tensor.stored[place])


def linear(x: jax.Array, stack: LayerStack | QuantizedTensor, layer: Layer | None = None) -> jax.Array:
    """x [tokens, columns] times the transposed matrix (of one layer): float32 [tokens, rows].

    The dtype of x is the arithmetic (see pallas_kernels.quantized_matmul). Differentiable with respect to x.
    """
    tensor, index = _locate(stack, layer)
    return quantized_matmul(x, tensor.stored, index, tensor.format)


def grouped_linear(
    x: jax.Array, group_sizes: jax.Array, stack: LayerStack | QuantizedTensor, layer: Layer | None = None
) -> jax.Array:
    """Rows of x [m, columns], sorted by expert, times the transposed matrix of their expert: float32 [m, rows].

    `group_sizes` int32 [experts]; rows beyond their sum give zero. Differentiable with respect to x.
    """
    tensor, index = _locate(stack, layer)
    return grouped_matmul(x, group_sizes, tensor.stored, index, tensor.format)


def _locate(stack: LayerStack | QuantizedTensor, layer: Layer | None):
    if isinstance(stack, QuantizedTensor):
        return stack, ()
    if layer is None:
        raise ValueError("linear: a stack of layers needs a layer")
    tensor, place = stack.select(layer)
    return tensor, (jnp.asarray(place, jnp.int32),)


def _from_json(data: bytes):
    """Static fields as they were: JSON lists are tuples."""
    return tuple(tuple(field) if isinstance(field, list) else field for field in json.loads(bytes(data)))


for _kind in (QuantizedTensor, LayerStack):  # so that a step over them survives jax.export
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"ferrum_jax.{_kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=_from_json,
    )
