"""Compares the parts of a model on a mesh of eight devices with one device and with arithmetic, in a separate process:

python -m support.eight_devices MODEL
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import Mesh

from ferrum_jax import memory
from ferrum_jax.distributed import Placement
from ferrum_jax.quantized import QuantizedTensor
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.stream import abstract_parameters, read_parameters
from pallas_kernels.blocks import format_of
from pallas_kernels.blocks.layouts import LAYOUTS
from pallas_kernels.dispatch import Target

CPU, GPU, TPU = Target("cpu"), Target("gpu", "9.0"), Target("tpu", "v5e")
CASES = [({"expert": 4, "tensor": 2}, kind) for kind in (CPU, GPU, TPU)]
CASES += [(sizes, CPU) for sizes in ({"data": 2, "tensor": 4}, {"tensor": 8})]


def main(path: str) -> None:
    with open_model(path) as source:
        places = parameters(source, source.config())
        whole = read_parameters(source, places, Placement.of())
        for sizes, target in CASES:
            mesh = Mesh(np.array(jax.devices()).reshape(*sizes.values()), tuple(sizes))
            placement = dataclasses.replace(Placement.over(mesh), target=target)
            abstract = abstract_parameters(places, placement)
            planned = abstract_parameters(places, Placement.abstract(target, sizes))
            assert memory.nbytes(abstract) == memory.nbytes(planned), (sizes, target)
            placed = read_parameters(source, places, placement)
            check(placed, abstract, whole)
            if target == CPU:
                put = jax.device_put(whole, jax.tree.map(lambda leaf: leaf.sharding, abstract))
                pairs = zip(*map(jax.tree.leaves, (put, placed)), strict=True)
                assert all(np.array_equal(*map(np.asarray, pair)) for pair in pairs)
                check(put, abstract, whole)
            cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
            print(sizes, target, f"{memory.nbytes(placed)} of {memory.nbytes(whole)} bytes, {cut} planes cut")


def check(placed: dict, abstract: dict, whole: dict) -> None:
    """Shards are where the abstract tree says, of its local sizes, and hold the right parts of the weights."""
    for leaf, shape in zip(*map(jax.tree.leaves, (placed, abstract)), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), (leaf.sharding, shape.sharding)
    for device in jax.devices():
        shards = (shard for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards)
        assert sum(shard.data.nbytes for shard in shards if shard.device == device) == memory.nbytes(abstract)
    for ours, exact in zip(*(jax.tree.leaves(tree, is_leaf=is_tensor) for tree in (placed, whole)), strict=True):
        if is_tensor(ours):
            check_parts(ours, np.asarray(format_of(exact.format).decode(exact.planes[0])))


def is_tensor(node: object) -> bool:
    return isinstance(node, QuantizedTensor)


def check_parts(tensor: QuantizedTensor, values: np.ndarray) -> None:
    """What a device's planes hold, decoded as a matrix of their own, is its part of `values` [*stack, *matrix], exactly."""
    layout, count = LAYOUTS[tensor.memory_layout], len(tensor.matrix)
    along = layout.AXES if count == 2 else (0,)
    for shards in zip(*(plane.addressable_shards for plane in tensor.planes), strict=True):
        *stack, ranges = (*shards[0].index[:-count], [slice(None)] * count)
        local = list(tensor.matrix)
        for axis, span, size, all in zip(along, shards[0].index[-count:], *(
            shape[-count:] for shape in (shards[0].data.shape, tensor.planes[0].shape)
        ), strict=True):  # fmt: skip
            local[axis] = tensor.matrix[axis] * size // all
            start = (span.start or 0) // size * local[axis]
            ranges[axis] = slice(start, start + local[axis])
        part = values[(*stack, *ranges)]
        planes = tuple(np.asarray(shard.data).reshape(-1, *shard.data.shape[-count:]) for shard in shards)
        ours = planes[0] if count == 1 else decoded(planes, tensor.memory_layout, tensor.format, *local)
        assert np.array_equal(np.asarray(ours).reshape(part.shape), part), tensor


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def decoded(planes: tuple[jax.Array, ...], layout: str, format: str, rows: int, columns: int) -> jax.Array:
    return jax.vmap(lambda *planes: LAYOUTS[layout].decode(planes, format, rows, columns))(*planes)


if __name__ == "__main__":
    main(sys.argv[1])
