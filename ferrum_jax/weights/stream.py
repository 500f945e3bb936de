"""Weights from a checkpoint to the device, one tensor at a time, never twice in memory.

Tensors of one parameter and one format form a stack with the layer axis first. On CPU the file is read straight into the
memory that the arrays then own; elsewhere each tensor is sent to the device and put into its stack by a donated update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.weights.block_scales import read_blocks
from ferrum_jax.weights.names import Parameters, Path, kept_format, kinds_of
from ferrum_jax.weights.source import ModelSource
from pallas_kernels.blocks import format_of
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.ordered import SUFFIX
from pallas_kernels.dispatch import Target, target_of

Progress = Callable[[int, int | None, str], None]
_READERS = 2  # threads
_ALIGNMENT = 64  # bytes; what the CPU backend asks for to take over a buffer as it is
_LEAST_FACTOR = 0.01  # of a rotary frequency: less, and angles of far positions are no numbers


def read_parameters(source: ModelSource, parameters: Parameters, device: jax.Device, progress: Progress | None = None) -> dict:
    """The parameter tree of `models.Decoder` or `models.bert`, on the device. `progress(done_bytes, total_bytes, text)` is
    called as it goes. Raises `ModelFileError` for a norm or bias that is not plain numbers, or a file that ends early."""
    for tensor in (*parameters.whole.values(), *(t for ts in parameters.stacked.values() for t in ts if t)):
        if len(tensor.shape) == 1 and tensor.format not in ("F32", "F16", "BF16"):
            raise ModelFileError(f"{source.path}: tensor {tensor.name}: {tensor.format} where plain numbers are expected")
    return _tree(parameters, _Reader(source, parameters.rows, device, progress).fill, target_of(device))


def abstract_parameters(parameters: Parameters, target: Target) -> dict:
    """The tree of `read_parameters` for a device of the kind `target`, as `jax.ShapeDtypeStruct`s: nothing is read."""
    return _tree(parameters, lambda path, tensors, stack: stack, target)


Maker = Callable[[Path, Sequence[TensorInfo], QuantizedTensor], QuantizedTensor]


def _tree(parameters: Parameters, make: Maker, target: Target) -> dict:
    """Every parameter, made by `make(path, tensors of one format, their stack as shapes)`."""
    tree: dict = {}
    for path, tensor in parameters.whole.items():
        looked_up = path == ("embedding",) and ("unembedding",) in parameters.whole
        whole = make(path, [tensor], _stack(path, [tensor], target, kernels=not looked_up))
        planes = tuple(_without_first_axis(plane) for plane in whole.planes)
        tree[path[0]] = planes[0] if len(tensor.shape) == 1 else dataclasses.replace(whole, planes=planes)
    layers: dict = {}
    for path, tensors in parameters.stacked.items():
        kinds = kinds_of(tensors)
        stacks = {}
        for kind in sorted(set(kinds) - {""}):
            members = [t for t, own in zip(tensors, kinds, strict=True) if t and own == kind]
            stacks[kind] = make(path, members, _stack(path, members, target, kernels=True))
        node = layers
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = LayerStack(stacks, kinds)
    tree["layers"] = layers
    return tree


def _stack(path: Path, tensors: Sequence[TensorInfo], target: Target, *, kernels: bool) -> QuantizedTensor:
    """Tensors of one shape and format, stacked, in the layout that the kernels of the target read: shapes alone."""
    format, shape = kept_format(tensors[0]), tensors[0].shape
    if len(shape) == 1:
        plane: Any = jax.ShapeDtypeStruct((len(tensors), *shape), format_of(format).storage)
        return QuantizedTensor((plane,), format, "ggml", shape)
    *experts, rows, columns = shape
    layout = choose(format, rows, columns, target) if kernels else "ggml"
    layout += SUFFIX if tensors[0].order else ""
    planes: Any = (
        jax.ShapeDtypeStruct((len(tensors), *experts, *plane.shape), plane.dtype)
        for plane in LAYOUTS[layout].plane_shapes(format, rows, columns)
    )
    return QuantizedTensor(tuple(planes), format, layout, (rows, columns))


def _without_first_axis(plane: Any) -> Any:
    if isinstance(plane, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(plane.shape[1:], plane.dtype)
    if plane.device.platform == "cpu":  # by way of NumPy, which shares the memory: JAX would copy
        return jax.device_put(np.asarray(plane).reshape(plane.shape[1:]), plane.device)
    return plane.reshape(plane.shape[1:])


class _Reader:
    def __init__(
        self, source: ModelSource, rows: Mapping[TensorInfo, np.ndarray], device: jax.Device, progress: Progress | None
    ) -> None:
        self.source, self.rows, self.device, self.progress = source, rows, device, progress
        self.done = 0

    def fill(self, path: Path, tensors: Sequence[TensorInfo], stack: QuantizedTensor) -> QuantizedTensor:
        """The stack with the tensors' contents, on the device."""
        format = format_of(stack.format)
        shape = (*tensors[0].shape[:-1], format.stored_width(tensors[0].shape[-1]))
        layout = stack.memory_layout.removesuffix(SUFFIX)
        if self.device.platform == "cpu" and layout == "ggml":
            buffer = _aligned_empty((len(tensors), *shape), format.storage)
            with ThreadPoolExecutor(_READERS) as pool:  # half of the time is the kernel's, for fresh memory
                for tensor, _ in zip(tensors, pool.map(functools.partial(self._read, path), tensors, buffer), strict=True):
                    self._count(tensor)
            planes: tuple[jax.Array, ...] = (jax.device_put(buffer, self.device),)
        else:
            with jax.default_device(self.device):
                shapes = stack.planes[:-1] if tensors[0].order else stack.planes
                planes = tuple(jnp.zeros(plane.shape, plane.dtype) for plane in shapes)
            for i, tensor in enumerate(tensors):
                if layout != "ggml" and (packed := self.source.packed(tensor, layout)) is not None:
                    planes = _put_packed(planes, jax.device_put(packed, self.device), i)
                    self._count(tensor)
                else:
                    place = np.empty(shape, format.storage)
                    self._read(path, tensor, place)
                    self._count(tensor)
                    planes = _put(planes, jax.device_put(place, self.device), i, stack.format, layout)
        if tensors[0].order:
            planes = (*planes, jax.device_put(self._orders(tensors), self.device))
        return dataclasses.replace(stack, planes=planes)

    def _orders(self, tensors: Sequence[TensorInfo]) -> np.ndarray:
        """int32 [layers, *experts, columns]: the order of each matrix's columns."""
        orders = [tensor.order for tensor in tensors if tensor.order]
        out = _aligned_empty((len(orders), *orders[0].shape), np.dtype(np.int32))
        for place, order in zip(out, orders, strict=True):
            self.source.read_into(order, place.reshape(-1).view(np.uint8))
        return out

    def _read(self, path: Path, tensor: TensorInfo, place: np.ndarray) -> None:
        """Fills `place` (a contiguous array of the format's storage) with one tensor."""
        if len(tensor.shape) == 1:
            place[...] = _plain_numbers(self.source.read(tensor), tensor.format)
            if not np.isfinite(place).all() or (path == ("rope_factors",) and (place < _LEAST_FACTOR).any()):
                raise ModelFileError(f"{self.source.path}: tensor {tensor.name}: holds values that no model can have")
        elif self.source.checks_scales:
            self.source.read_into(tensor, place.reshape(-1).view(np.uint8))
        else:
            read_blocks(self.source, tensor, place.reshape(-1).view(np.uint8))
        if (rows := self.rows.get(tensor)) is not None:
            place[...] = place[rows]

    def _count(self, tensor: TensorInfo) -> None:
        self.done += tensor.nbytes + (tensor.order.nbytes if tensor.order else 0)
        if self.progress is not None:
            self.progress(self.done, self.source.tensor_bytes, "loading")


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _put(planes: tuple[jax.Array, ...], stored: jax.Array, i: int, format: str, layout: str) -> tuple[jax.Array, ...]:
    """Packs one tensor's blocks [*experts, rows, width] into place i of its stack."""
    pack = functools.partial(LAYOUTS[layout].pack, format=format)
    for _ in stored.shape[:-2]:  # experts one after the other: a tenth of the time to compile, and no temporaries
        pack = functools.partial(jax.lax.map, pack)
    return _put_packed(planes, pack(stored), i)


@functools.partial(jax.jit, donate_argnums=0)
def _put_packed(planes: tuple[jax.Array, ...], parts: tuple[jax.Array, ...], i: int) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dynamic_update_index_in_dim(a, b, i, 0) for a, b in zip(planes, parts, strict=True))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that starts at a multiple of `_ALIGNMENT`."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _plain_numbers(raw: np.ndarray, format: str) -> np.ndarray:
    if format == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if format == "F32" else "<f2").astype(np.float32)


def bytes_by_format(params: dict) -> dict[str, int]:
    """Bytes on the device of the parameters, by block format; plain vectors count as F32."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QuantizedTensor)):
        arrays, format = (leaf.planes, leaf.format) if isinstance(leaf, QuantizedTensor) else ((leaf,), "F32")
        sizes[format] = sizes.get(format, 0) + sum(array.nbytes for array in arrays)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
