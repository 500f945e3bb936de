"""A Qwen3-MoE of random weights, made where it will be read: no file, and nothing but small pools from the host.

A pool is a few megabytes of valid random blocks (pallas_kernels.blocks.synthetic); a matrix is blocks drawn from it at
random, packed by the layout that the device's kernels read, as loading packs them. The mix of formats is llama.cpp's
Q4_K_M, and tokens outweigh what layers add, as in make_synthetic.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.lab import Lab
from ferrum_jax.config import ModelConfig
from ferrum_jax.quantized import QuantizedTensor
from ferrum_jax.weights import names
from ferrum_jax.weights.gguf_header import TensorInfo
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels.blocks import FORMATS
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.synthetic import random_blocks

WEIGHT_STD = 0.03
STDS = {"embedding": 1.0, "output": 0.01, "expert_down": 0.01}
POOL_BYTES = 4 << 20


def more_bits(layer: int, layers: int) -> bool:
    """Which layers llama.cpp's Q4_K_M gives 6 bits for attn_v and ffn_down."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(config: ModelConfig) -> list[TensorInfo]:
    """The tensors of the model's Q4_K_M file, as if there were one."""
    hidden, inner, experts, head = (
        config.hidden_size,
        config.expert_intermediate_size,
        config.num_experts,
        config.head_dim,
    )
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    vectors = {"attn_norm": hidden, "attn_q_norm": head, "attn_k_norm": head, "ffn_norm": hidden}
    matrices = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, inner, hidden),
        "ffn_up_exps": (experts, inner, hidden),
        "ffn_down_exps": (experts, hidden, inner),
    }
    listed = [
        ("token_embd", "Q4_K", (config.vocab_size, hidden)),
        ("output_norm", "F32", (hidden,)),
        ("output", "Q6_K", (config.vocab_size, hidden)),
    ]
    for layer in range(config.num_layers):
        large = ("attn_v", "ffn_down_exps") if more_bits(layer, config.num_layers) else ()
        for name, size in vectors.items():
            listed.append((f"blk.{layer}.{name}", "F32", (size,)))
        for name, shape in matrices.items():
            format = "F32" if name == "ffn_gate_inp" else "Q6_K" if name in large else "Q4_K"
            listed.append((f"blk.{layer}.{name}", format, shape))
    return [TensorInfo(f"{name}.weight", format, shape, Path(), 0, 0) for name, format, shape in listed]


def make(lab: Lab, config: ModelConfig) -> dict:
    """The parameters of `functional`'s programs, on the device."""
    lab.ahead(lambda scout: make(scout, config))
    file: Any = SimpleNamespace(path="synthetic", tensors={tensor.name: tensor for tensor in tensors(config)})
    tree = abstract_parameters(names.parameters(file, config), lab.target)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        words = [word for word in STDS if f"'{word}'" in name]
        return make_tensor(lab, leaf, STDS[words[0]] if words else WEIGHT_STD, name)

    return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=lambda node: isinstance(node, QuantizedTensor))


def stack(lab: Lab, format: str, *shape: int, seed: str = "") -> QuantizedTensor:
    """Random matrices [*stack, rows, columns] in the layout of the lab's target."""
    *lead, rows, columns = shape
    layout = choose(format, rows, columns, lab.target)
    planes: Any = tuple(
        jax.ShapeDtypeStruct((*lead, *plane.shape), plane.dtype)
        for plane in LAYOUTS[layout].plane_shapes(format, rows, columns)
    )
    return make_tensor(lab, QuantizedTensor(planes, format, layout, (rows, columns)), WEIGHT_STD, f"{shape}{seed}")


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
    static = {"planes": tensor.planes, "format": tensor.format, "layout": tensor.memory_layout, "matrix": tensor.matrix}
    return dataclasses.replace(tensor, planes=lab.run(draw, lab.put(pool), key, **static))


def normal(key, *, mean: float, std: float, shape: tuple[int, ...]) -> jax.Array:
    """float32 of `shape`."""
    return mean + std * jax.random.normal(key, shape)


def draw(pool, key, *, planes, format: str, layout: str, matrix: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Planes of a stack of matrices whose blocks are drawn from `pool` uint8 [blocks, block_bytes]: one layer (an entry
    of the stack's first axis) at a time, as loading does."""
    rows, columns = matrix
    axes = len(planes[0].shape) - len(LAYOUTS[layout].plane_shapes(format, rows, columns)[0].shape)
    lead = planes[0].shape[:axes]

    def packed(key, lead):
        ids = jax.random.randint(key, (*lead, rows, columns // FORMATS[format].block_size), 0, pool.shape[0])
        stored = pool[ids].reshape(*lead, rows, -1)
        pack = lambda stored: LAYOUTS[layout].pack(stored, format)  # noqa: E731
        for _ in lead:
            pack = jax.vmap(pack)
        return pack(stored)

    if not lead:
        return packed(key, ())

    def put(i, arrays):
        parts = packed(jax.random.fold_in(key, i), lead[1:])
        return tuple(lax.dynamic_update_index_in_dim(a, b, i, 0) for a, b in zip(arrays, parts, strict=True))

    return lax.fori_loop(0, lead[0], put, tuple(jnp.zeros(plane.shape, plane.dtype) for plane in planes))
