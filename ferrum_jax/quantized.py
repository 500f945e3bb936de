"""Compressed tensors as pytrees, and `linear` and `grouped_linear`, the only way from the model to the kernels.

A `QuantizedTensor` consists of arrays of stored blocks and, as a static field, the name of their format. Layers of a model are
stacked; if a file mixes formats, a `LayerStack` holds one stack per format and the format of each layer. A layer is never
sliced out: the operation gets a `Layer` and reads its blocks in place.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import export, lax

from pallas_kernels.blocks import format_of
from pallas_kernels.blocks.layouts import LAYOUTS, gather_rows, unpack_rows
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import Biases, Clamp, ExpertAdapters, expert_ffn, grouped_matmul, matmul_by_head
from pallas_kernels.quantized_matmul import quantized_matmul, quantized_matmuls, swiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """Matrices [*stack, rows, columns], or vectors [*stack, columns], in blocks of `format` along the columns.

    planes: the arrays that `memory_layout` keeps them in (pallas_kernels.blocks.layouts); `matrix`: (rows, columns) or
    (columns,). cut: inside `mapped.mapped`, where a tensor is a device's part, the axes of the mesh that each dimension is
    cut over; else (). The functions here sum what devices have computed with their parts of the columns, or of the experts.
    """

    planes: tuple[jax.Array, ...]
    format: str = dataclasses.field(metadata={"static": True})
    memory_layout: str = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    cut: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, stored: jax.Array, format: str, *, vectors: bool = False) -> QuantizedTensor:
        """Made from blocks in file order, [*stack, rows, stored width] of the dtype `format_of(format).storage`."""
        known = format_of(format)
        columns = stored.shape[-1] * known.storage.itemsize // known.block_bytes * known.block_size
        return cls((stored,), format, "ggml", (columns,) if vectors else (stored.shape[-2], columns))

    @property
    def shape(self) -> tuple[int, ...]:
        """[*stack, rows, columns], in weights."""
        plane = LAYOUTS[self.memory_layout].plane_shapes(self.format, *(1, *self.matrix)[-2:])[0]
        axes = len(plane.shape) if len(self.matrix) == 2 else 1
        return (*self.planes[0].shape[: self.planes[0].ndim - axes], *self.matrix)

    def operand(self, *index: jax.Array | int) -> Matrix:
        """The matrix at `index` of the stack, for the kernels."""
        return Matrix(self.planes, (), self.format, self.memory_layout, *self.matrix).at(*index)

    def over(self, axis: int) -> tuple[str, ...]:
        """The axes of the mesh that a dimension is cut over."""
        return self.cut[axis] if self.cut else ()

    def gather(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` [tokens] of a matrix without stack axes, unpacked: float32 [tokens, columns]."""
        if not (over := self.over(-2)):
            return gather_rows(self.operand(), ids)
        own, is_own = _own(ids, self.matrix[0], over)
        rows = gather_rows(self.operand(), jnp.where(is_own, own, 0))
        return lax.psum(jnp.where(is_own[:, None], rows, 0.0), over)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer `first` plus `step * period` of each of its `loops` (period, step): a period is known while tracing, a step may
    be the counter of a scan.

    The layers at the same place of each period of a scan have the same spec and formats.
    """

    first: int
    loops: tuple[tuple[int, jax.Array | int], ...] = ()

    @property
    def number(self) -> jax.Array | int:
        return sum((step * period for period, step in self.loops), start=self.first)

    def index(self, labels: Sequence[Hashable]) -> jax.Array | int:
        """The layer's index among those that have its label; labels: one for each layer of the model."""
        label = labels[self.first]
        index: jax.Array | int = labels[: self.first].count(label)
        for period, step in self.loops:
            index = index + step * labels[self.first : self.first + period].count(label)
        return index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStack:
    """One parameter of all layers. `formats[l]` names the format of layer l ("" if the layer does not have the parameter);
    `stacks[format]` holds the layers of that format in order, layer axis first."""

    stacks: dict[str, QuantizedTensor]
    formats: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def has(self, layer: Layer) -> bool:
        return bool(self.formats[layer.first])

    def select(self, layer: Layer) -> tuple[QuantizedTensor, jax.Array | int]:
        """The stack that holds the layer, and the layer's index in it."""
        return self.stacks[self.formats[layer.first]], layer.index(self.formats)

    def located(self, layer: Layer) -> tuple[jax.Array, jax.Array | int]:
        """For a parameter stored as plain numbers (norms, biases): float32 [n, columns] and the layer's index in it."""
        tensor, index = self.select(layer)
        return format_of(tensor.format).decode(tensor.planes[0]), index

    def vector(self, layer: Layer) -> jax.Array:
        """The layer's parameter as float32, for one stored as plain numbers: [columns]."""
        values, index = self.located(layer)
        return values[index]


Stack = LayerStack | QuantizedTensor


def linear(
    x: jax.Array, stack: Stack, layer: Layer | None = None, arithmetic: str = "", implementation: Implementation = None
) -> jax.Array:
    """Rows times a transposed matrix, which stays in its blocks. Differentiable with respect to x.

    Args:
      x: [tokens, columns]; its dtype is the arithmetic, except for "int8".
      stack: the matrix, or those of all layers.
      layer: which one, for a stack of layers.
      arithmetic: "int8" or "int8x2", as for `quantized_matmul`.
      implementation: the backend to take, as for `quantized_matmul`.

    Returns:
      float32 [tokens, rows].

    Raises:
      ValueError: if x and the matrix do not fit, a stack of layers is without `layer`, or the backend cannot serve them.
    """
    return _summed(quantized_matmul(x, operand(stack, layer), arithmetic, implementation), stack, layer)


def linears(
    x: jax.Array,
    stacks: Sequence[Stack],
    layer: Layer | None = None,
    arithmetic: str = "",
    implementation: Implementation = None,
) -> list[jax.Array]:
    """`linear` with several matrices that share x, in one launch if the device can."""
    ys = quantized_matmuls(x, [operand(stack, layer) for stack in stacks], arithmetic, implementation)
    return [_summed(y, stack, layer) for y, stack in zip(ys, stacks, strict=True)]


def gated_linear(
    x: jax.Array,
    gate: Stack,
    up: Stack,
    layer: Layer | None = None,
    arithmetic: str = "",
    implementation: Implementation = None,
) -> jax.Array:
    """silu(gate x) * up x: [tokens, rows] in the dtype of x. Differentiable with respect to x."""
    return swiglu(x, operand(gate, layer), operand(up, layer), arithmetic, implementation)


def grouped_linear(
    x: jax.Array, group_sizes: jax.Array, stack: Stack, layer: Layer | None = None, implementation: Implementation = None
) -> jax.Array:
    """Rows, sorted by expert, times the transposed matrix of their expert. Differentiable with respect to x.

    Args:
      x: [m, columns].
      group_sizes: int32 [experts], rows of each expert; rows beyond their sum give zero.
      stack: the experts, or those of all layers.
      layer: which one, for a stack of layers.
      implementation: the backend to take, as for `grouped_matmul`.

    Returns:
      float32 [m, rows].

    Raises:
      ValueError: as `linear`.
    """
    return grouped_matmul(x, group_sizes, operand(stack, layer), implementation=implementation)


def linear_by_head(
    x: jax.Array, stack: Stack, layer: Layer | None = None, arithmetic: str = "", implementation: Implementation = None
) -> jax.Array:
    """Each head's row times the transposed matrix of that head. Differentiable with respect to x.

    Args:
      x: [tokens, heads, columns].
      stack: [heads, rows, columns], or those of all layers.
      layer: which one, for a stack of layers.
      arithmetic: "int8x2", as for `matmul_by_head`.
      implementation: the backend to take, as for `matmul_by_head`.

    Returns:
      float32 [tokens, heads, rows].

    Raises:
      ValueError: as `linear`.
    """
    return matmul_by_head(x, operand(stack, layer), arithmetic, implementation)


def mixture(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Stack,
    up: Stack,
    down: Stack,
    layer: Layer | None = None,
    arithmetic: str = "",
    implementation: Implementation = None,
    *,
    biases: Sequence[Stack] = (),
    clamp: Clamp | None = None,
    adapters: ExpertAdapters | None = None,
    activation: str = "silu",
) -> jax.Array:
    """The weighted sum of each token's experts, each down(silu(gate x) * up x): float32 [tokens, columns].

    x [tokens, columns]; expert_ids int32 and expert_weights float32 [tokens, top_k]; the id `num_experts` means no expert.
    biases: of gate, up and down [experts, rows], or none; clamp, adapters, activation: as of `expert_ffn`.
    """
    gates, ups, downs = (operand(stack, layer) for stack in (gate, up, down))
    added = [operand(stack, layer) for stack in biases]
    known = Biases(*(unpack_rows(bias, 0, bias.rows) for bias in added)) if added else None
    tensor = tensor_of(down, layer)
    whole, parts = tensor.over(-3), tensor.over(-1)  # the axes that experts are cut over, and each expert's width
    if whole:
        own, is_own = _own(expert_ids, tensor.shape[-3], whole)
        expert_ids = jnp.where(is_own, own, tensor.shape[-3])
    if known and parts:  # one of the devices adds it
        known = known._replace(down=jnp.where(lax.axis_index(parts) == 0, known.down, 0.0))
    arguments = x, expert_ids, expert_weights, gates, ups, downs, arithmetic, implementation
    y = expert_ffn(*arguments, biases=known, clamp=clamp, adapters=adapters, activation=activation)
    return lax.psum(y, (*whole, *parts)) if whole or parts else y


def operand(stack: Stack, layer: Layer | None) -> Matrix:
    """The matrix (or the experts) of one layer, in its stack."""
    tensor, index = _located(stack, layer)
    return tensor.operand(*index)


def tensor_of(stack: Stack, layer: Layer | None) -> QuantizedTensor:
    """The tensor that the matrix of one layer is in."""
    return _located(stack, layer)[0]


def _located(stack: Stack, layer: Layer | None) -> tuple[QuantizedTensor, tuple[jax.Array | int, ...]]:
    """The tensor that the matrix of one layer is in, and its place there."""
    if isinstance(stack, QuantizedTensor):
        return stack, ()
    if layer is None:
        raise ValueError("linear: a stack of layers needs a layer")
    tensor, index = stack.select(layer)
    return tensor, (index,)


def _summed(y: jax.Array, stack: Stack, layer: Layer | None) -> jax.Array:
    """A product with a matrix: the sum over the devices that have parts of its columns."""
    over = tensor_of(stack, layer).over(-1)
    return lax.psum(y, over) if over else y


def _own(ids: jax.Array, count: int, over: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """ids int32 of things of which each device has `count`, counted from this device's first; bool: whether it has them."""
    own = ids - lax.axis_index(over) * count
    return own, (own >= 0) & (own < count)


def _from_json(data: bytes) -> tuple:
    """Static fields restored from JSON, whose lists become tuples."""
    return tuple(tuple(field) if isinstance(field, list) else field for field in json.loads(bytes(data)))


for _kind in (QuantizedTensor, LayerStack):  # so that a step with them survives jax.export
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"ferrum_jax.{_kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=_from_json,
    )
