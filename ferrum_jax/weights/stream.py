"""Loads weights from a checkpoint to the device, one tensor at a time, without a second copy in memory.

Tensors of one parameter and one format form a stack with the layer axis first. On CPU the file is read straight into the
memory that the arrays then own; elsewhere each tensor is sent to the device and put into its stack by a donated update.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ferrum_jax.config import Attention, ModelConfig
from ferrum_jax.distributed.axes import HEADS
from ferrum_jax.distributed.placement import Axis, Cuts, Placement
from ferrum_jax.distributed.share import head_axes, own_kv_heads, share
from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from ferrum_jax.state import page_kinds
from ferrum_jax.weights.block_scales import read_blocks
from ferrum_jax.weights.names import Parameters, Path, is_plain, kept_format, kinds_of
from ferrum_jax.weights.source import ModelSource
from pallas_kernels.blocks import format_of
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.ordered import SUFFIX

Progress = Callable[[int, int | None, str], None]
_READERS = 2  # threads
_ALIGNMENT = 64  # bytes; the CPU backend adopts a buffer without copying if it is aligned to this
_LEAST_FACTOR = 0.01  # of a rotary frequency; with smaller ones the angles of far positions are not finite


def read_parameters(
    source: ModelSource, parameters: Parameters, placement: Placement, progress: Progress | None = None
) -> dict:
    """The parameter tree of `models.Decoder` or `models.bert`, in its place. `progress(done_bytes, total_bytes, text)` is
    called as it goes. Raises `ModelFileError` for a norm or bias that is not plain numbers, or a file that ends early."""
    for tensor in (*parameters.whole.values(), *(t for ts in parameters.stacked.values() for t in ts if t)):
        if is_plain(tensor) and tensor.format not in ("F32", "F16", "BF16"):
            raise ModelFileError(f"{source.path}: tensor {tensor.name}: {tensor.format} where plain numbers are expected")
    reader = _Reader(source, parameters.rows, placement, progress)
    with placement.as_default():
        return _tree(parameters, placement, reader.fill)


def abstract_parameters(parameters: Parameters, placement: Placement) -> dict:
    """The tree of `read_parameters` as `jax.ShapeDtypeStruct`s with shardings; nothing is read."""
    return _tree(parameters, placement, lambda path, tensors, stack, cuts: stack)


def fitted(placement: Placement, parameters: Parameters, config: ModelConfig) -> Placement:
    """The placement for this model. Attention stays whole on every device, in all layers, unless each device gets whole blocks
    of the output matrix and its queries' heads of keys and values, in every layer."""
    (count,) = placement.parts((head_axes(placement),))
    if count == 1:
        return placement
    shapes = _Shapes(parameters, placement)

    def fits(mixer: Attention) -> bool:
        queries, keys = (shapes.count("heads", heads) for heads in (mixer.num_heads, mixer.num_kv_heads))
        if mixer.latent is not None:
            return queries == count
        own = own_kv_heads(mixer, count)
        return queries == count and (own, keys) in ((mixer.num_kv_heads // count, count), (1, 1))

    of_device = share(config, placement)
    alike = [kind.layers for kind in page_kinds(of_device)] == [kind.layers for kind in page_kinds(config)]
    if alike and all(map(fits, config.attentions)):
        return placement
    rules = dict(placement.rules) | {name: () for name, over in placement.rules.items() if name in HEADS}
    return dataclasses.replace(placement, rules=MappingProxyType(rules))


Maker = Callable[[Path, Sequence[TensorInfo], QuantizedTensor, Cuts], QuantizedTensor]


def _tree(parameters: Parameters, placement: Placement, make: Maker) -> dict:
    """Every parameter, made by `make(path, tensors of one format, what it is as shapes, how each tensor is cut)`."""
    shapes = _Shapes(parameters, placement)

    def made(path: Path, tensors: Sequence[TensorInfo], stack: tuple[int, ...]) -> QuantizedTensor:
        cuts = shapes.cuts(tensors)
        return make(path, tensors, shapes.of(path, tensors[0], stack, cuts), cuts)

    tree: dict = {}
    for path, tensor in parameters.whole.items():
        whole = made(path, [tensor], ())
        tree[path[0]] = whole.planes[0] if len(tensor.shape) == 1 else whole
    layers: dict = {}
    for path, tensors in parameters.stacked.items():
        node = layers
        for name in path[:-1]:
            node = node.setdefault(name, {})
        stacks = {kind: made(path, members, (len(members),)) for kind, members in _kinds(tensors).items()}
        node[path[-1]] = LayerStack(stacks, kinds_of(tensors))
    tree["layers"] = layers
    return tree


def _kinds(tensors: Sequence[TensorInfo | None]) -> dict[str, list[TensorInfo]]:
    """The tensors of a parameter by what makes them one stack."""
    kinds = kinds_of(tensors)
    return {kind: [t for t, own in zip(tensors, kinds, strict=True) if t and own == kind] for kind in sorted(set(kinds) - {""})}


class _Shapes:
    """Which planes the parameters have, and where.

    Axes that have the same rule and as many runs are cut alike in all tensors, or in none: into as many parts as all of them
    can be. So the rows of `up` are cut only where the columns of `down` can be, at the ends of blocks, and what belongs to a
    head is where the head is, be it rows, columns or one number.
    """

    def __init__(self, parameters: Parameters, placement: Placement) -> None:
        self.placement, self.axes = placement, parameters.axes
        self.looked_up = [("inputs_embedding",), *([("embedding",)] if ("unembedding",) in parameters.whole else [])]
        stacks = [(path, [tensor]) for path, tensor in parameters.whole.items()]
        stacks += [(path, members) for path, ts in parameters.stacked.items() for members in _kinds(ts).values()]
        self.pieces: dict[Any, int] = {}  # by rule and number of runs
        for path, members in stacks:
            tensor, axes = members[0], self._axes(members)
            units = [1] * len(axes)
            if len(axes) > 1:
                memory_layout = self._layout(path, tensor, *tensor.shape[-2:])
                units[-1] = tensor.shape[-1] if tensor.order else LAYOUTS[memory_layout].unit(kept_format(tensor))
            for axis, size, unit in zip(axes, tensor.shape, units, strict=True):
                key = self._key(axis, size)
                self.pieces[key] = math.gcd(self.pieces.get(key, 0), size // math.lcm(axis.run, unit))

    def _axes(self, tensors: Sequence[TensorInfo]) -> list[Axis]:
        """Of a stack: its runs are whole runs of all its tensors."""
        found = zip(*(self.axes[tensor] for tensor in tensors), strict=True)
        return [Axis(axes[0].name, math.lcm(*(axis.run for axis in axes))) for axes in found]

    def _key(self, axis: Axis, size: int) -> tuple[tuple[str, ...], int]:
        return self.placement.rules.get(axis.name, ()), size // axis.run

    def count(self, name: str, runs: int) -> int:
        """Into how many parts dimensions with this name and as many runs are cut."""
        pieces = self.pieces.get(self._key(Axis(name), runs), 1)
        return self.placement.parts(self.placement.cuts([Axis(name)], [pieces]))[0]

    def _layout(self, path: Path, tensor: TensorInfo, rows: int, columns: int) -> str:
        return "ggml" if path in self.looked_up else _choose(kept_format(tensor), rows, columns, self.placement.target)

    def cuts(self, tensors: Sequence[TensorInfo]) -> Cuts:
        """How each tensor of a stack is cut."""
        axes, shape = self._axes(tensors), tensors[0].shape
        runs = [size // self.pieces[self._key(axis, size)] for axis, size in zip(axes, shape, strict=True)]
        return self.placement.cuts([Axis(axis.name, run) for axis, run in zip(axes, runs, strict=True)], shape)

    def of(self, path: Path, tensor: TensorInfo, stack: tuple[int, ...], cuts: Cuts) -> QuantizedTensor:
        """Tensors like this one, stacked, in the memory layout that the kernels of the target read: the planes of a matrix that
        is cut are those of its parts, one after the other, so that each device has a matrix as the kernels know it."""
        format = kept_format(tensor)

        def placed(shape: Sequence[int], dtype: Any, cuts: Cuts) -> Any:
            sharding = self.placement.over_cuts((*[()] * len(stack), *cuts))
            return jax.ShapeDtypeStruct((*stack, *shape), dtype, sharding=sharding)

        if len(tensor.shape) == 1:
            return QuantizedTensor((placed(tensor.shape, format_of(format).storage, cuts),), format, "ggml", tensor.shape)
        *experts, rows, columns = tensor.shape
        parts = self.placement.parts(cuts)[-2:]
        local = rows // parts[0], columns // parts[1]
        memory_layout = self._layout(path, tensor, *local) + (SUFFIX if tensor.order else "")
        planes = []
        for plane in LAYOUTS[memory_layout].plane_shapes(format, *local):
            along = LAYOUTS[memory_layout].AXES if len(plane.shape) == 2 else (1,)
            shape = [size * parts[axis] for size, axis in zip(plane.shape, along, strict=True)]
            planes.append(placed((*experts, *shape), plane.dtype, (*cuts[:-2], *(cuts[-2:][axis] for axis in along))))
        return QuantizedTensor(tuple(planes), format, memory_layout, (rows, columns))


_choose = functools.cache(choose)  # for a TPU it traces the packing


class _Reader:
    def __init__(
        self, source: ModelSource, rows: Mapping[TensorInfo, np.ndarray], placement: Placement, progress: Progress | None
    ) -> None:
        self.source, self.rows, self.placement, self.progress = source, rows, placement, progress
        self.done = 0

    def fill(self, path: Path, tensors: Sequence[TensorInfo], stack: QuantizedTensor, cuts: Cuts) -> QuantizedTensor:
        """The stack with the tensors' contents, in its place."""
        memory_layout = stack.memory_layout.removesuffix(SUFFIX)
        places = stack.planes[:-1] if tensors[0].order else stack.planes
        planes: tuple[jax.Array, ...]
        if self.placement.platform == "cpu" and memory_layout == "ggml":
            buffer = _aligned_empty((len(tensors), *_stored_shape(tensors[0])), format_of(stack.format).storage)
            with ThreadPoolExecutor(_READERS) as pool:  # half of the time the operating system provides fresh memory
                for tensor, _ in zip(tensors, pool.map(functools.partial(self._read, path), tensors, buffer), strict=True):
                    self._count(tensor)
            planes = (jax.device_put(buffer.reshape(places[0].shape), places[0].sharding),)
        elif len(places[0].shape) == len(tensors[0].shape):  # not a stack
            planes = self._packed(path, tensors[0], memory_layout, places, cuts)
        else:
            planes = self.placement.zeros(places)
            for i, tensor in enumerate(tensors):
                planes = _put(planes, self._packed(path, tensor, memory_layout, places, cuts), i)
        if tensors[0].order:
            orders = stack.planes[-1]
            planes = (*planes, jax.device_put(self._orders(tensors).reshape(orders.shape), orders.sharding))
        return dataclasses.replace(stack, planes=planes)

    def _packed(
        self, path: Path, tensor: TensorInfo, memory_layout: str, places: Sequence[Any], cuts: Cuts
    ) -> tuple[jax.Array, ...]:
        """The planes of one tensor, packed on the device that each part is on. places: of the planes of its stack."""
        if memory_layout != "ggml" and not any(cuts) and (packed := self.source.packed(tensor, memory_layout)) is not None:
            self._count(tensor)
            return self.placement.put(packed)
        stored = np.empty(_stored_shape(tensor), format_of(kept_format(tensor)).storage)
        self._read(path, tensor, stored)
        self._count(tensor)
        parts = jax.device_put(stored, self.placement.over_cuts(cuts))
        shardings = tuple(plane.sharding for plane in places)
        return _packer(kept_format(tensor), memory_layout, stored.ndim, parts.sharding, shardings)(parts)

    def _orders(self, tensors: Sequence[TensorInfo]) -> np.ndarray:
        """int32 [layers, *experts, columns]: the order of each matrix's columns."""
        orders = [tensor.order for tensor in tensors if tensor.order]
        out = _aligned_empty((len(orders), *orders[0].shape), np.dtype(np.int32))
        for place, order in zip(out, orders, strict=True):
            self.source.read_into(order, place.reshape(-1).view(np.uint8))
        return out

    def _read(self, path: Path, tensor: TensorInfo, place: np.ndarray) -> None:
        """Fills `place` (a contiguous array of the format's storage) with one tensor."""
        if is_plain(tensor):
            place[...] = _plain_numbers(self.source.read(tensor), tensor.format).reshape(place.shape)
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


def _stored_shape(tensor: TensorInfo) -> tuple[int, ...]:
    """[*experts, rows, width]: of a tensor's blocks, or numbers."""
    return (*tensor.shape[:-1], format_of(kept_format(tensor)).stored_width(tensor.shape[-1]))


@functools.cache
def _packer(format: str, memory_layout: str, rank: int, parts: Sharding, places: tuple[Sharding, ...]) -> Callable:
    """Packs blocks [*experts, rows, width] of `rank` dimensions into planes: each device its own part."""
    pack: Callable = functools.partial(LAYOUTS[memory_layout].pack, format=format)
    for _ in range(rank - 2):  # one expert after the other: compiles in a tenth of the time, without temporaries
        pack = functools.partial(jax.lax.map, pack)
    if isinstance(parts, NamedSharding):
        specs = tuple(PartitionSpec(*tuple(place.spec)[-rank:]) for place in places if isinstance(place, NamedSharding))
        pack = jax.shard_map(pack, mesh=parts.mesh, in_specs=parts.spec, out_specs=specs, check_vma=False)
    return jax.jit(pack)


@functools.partial(jax.jit, donate_argnums=0)
def _put(planes: tuple[jax.Array, ...], parts: tuple[jax.Array, ...], i: int) -> tuple[jax.Array, ...]:
    """Puts the planes of one tensor into place i of its stack."""
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
