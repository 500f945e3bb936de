"""A Qwen3-MoE with random weights, made on the device that reads them: no file, and only small pools come from the host.

A pool is a few megabytes of valid random blocks (pallas_kernels.blocks.synthetic); a matrix is made of blocks drawn from it at
random, packed in the memory layout that the device's kernels read, as in loading. The mix of formats is llama.cpp's Q4_K_M, and
the embedding outweighs what layers add, as in make_synthetic.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.lab import Lab
from benchmarks.tensors import shapes
from ferrum_jax.config import ModelConfig
from ferrum_jax.quantized import QuantizedTensor
from pallas_kernels.blocks import FORMATS
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.synthetic import random_blocks

WEIGHT_STD = 0.03
STDS = {"embedding": 1.0, "output": 0.01, "expert_down": 0.01}
POOL_BYTES = 4 << 20


def make(lab: Lab, config: ModelConfig) -> dict:
    """The parameters for the programs of `functional`, on the device."""
    lab.ahead(lambda scout: make(scout, config))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        words = [word for word in STDS if f"'{word}'" in name]
        return make_tensor(lab, leaf, STDS[words[0]] if words else WEIGHT_STD, name)

    tree = shapes(config, lab.target)
    return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=lambda node: isinstance(node, QuantizedTensor))


def stack(lab: Lab, format: str, *shape: int, seed: str = "") -> QuantizedTensor:
    """Random matrices [*stack, rows, columns] in the memory layout of the lab's target."""
    *lead, rows, columns = shape
    memory_layout = choose(format, rows, columns, lab.target)
    planes: Any = tuple(
        jax.ShapeDtypeStruct((*lead, *plane.shape), plane.dtype)
        for plane in LAYOUTS[memory_layout].plane_shapes(format, rows, columns)
    )
    return make_tensor(lab, QuantizedTensor(planes, format, memory_layout, (rows, columns)), WEIGHT_STD, f"{shape}{seed}")


def make_tensor(lab: Lab, tensor, std: float, name: str):
    """The tensor that `tensor` (a QuantizedTensor or array of shapes) describes; `name` is its seed."""
    key = np.array([0, zlib.crc32(name.encode())], np.uint32)
    if not isinstance(tensor, QuantizedTensor):
        return lab.run(normal, key, mean=1.0, std=0.1, shape=tensor.shape)
    if tensor.format == "F32":
        plane = tensor.planes[0]
        mean, std = (1.0, 0.1) if len(tensor.matrix) == 1 else (0.0, std)
        return dataclasses.replace(tensor, planes=(lab.run(normal, key, mean=mean, std=std, shape=plane.shape),))
    known = FORMATS[tensor.format]
    count = POOL_BYTES // known.block_bytes if lab.sizes.real else 256
    pool = random_blocks(tensor.format, count, known.block_size, np.random.default_rng(zlib.crc32(name.encode())), std)
    static = {"planes": tensor.planes, "format": tensor.format, "memory_layout": tensor.memory_layout, "matrix": tensor.matrix}
    return dataclasses.replace(tensor, planes=lab.run(draw, lab.put(pool), key, **static))


def normal(key, *, mean: float, std: float, shape: tuple[int, ...]) -> jax.Array:
    """float32 of `shape`."""
    return mean + std * jax.random.normal(key, shape)


def draw(pool, key, *, planes, format: str, memory_layout: str, matrix: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Planes of a stack of matrices whose blocks are drawn from `pool` uint8 [blocks, block_bytes]: one layer (an entry
    of the stack's first axis) at a time, as loading does."""
    rows, columns = matrix
    axes = len(planes[0].shape) - len(LAYOUTS[memory_layout].plane_shapes(format, rows, columns)[0].shape)
    lead = planes[0].shape[:axes]

    def packed(key, lead):
        ids = jax.random.randint(key, (*lead, rows, columns // FORMATS[format].block_size), 0, pool.shape[0])
        stored = pool[ids].reshape(*lead, rows, -1)
        pack = lambda stored: LAYOUTS[memory_layout].pack(stored, format)  # noqa: E731
        for _ in lead:
            pack = jax.vmap(pack)
        return pack(stored)

    if not lead:
        return packed(key, ())

    def put(i, arrays):
        parts = packed(jax.random.fold_in(key, i), lead[1:])
        return tuple(lax.dynamic_update_index_in_dim(a, b, i, 0) for a, b in zip(arrays, parts, strict=True))

    return lax.fori_loop(0, lead[0], put, tuple(jnp.zeros(plane.shape, plane.dtype) for plane in planes))
