"""Which backends the dispatcher chooses on this machine, found by tracing small operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.progress import track
from pallas_kernels import dispatch
from pallas_kernels.append import append
from pallas_kernels.blocks import FORMATS
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.decoder_layers import LayerShape, Part, Stack, backend_for
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.paged_attention import KV_DTYPES, KVCache, Tables, make_metadata, paged_attention
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.routing import Router, route

_SIZE = 256  # rows and columns: a multiple of every format's block and of every kernel's tile
_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM = 4, 4, 2, 128
_LATENT = 576, 512  # cached numbers of a token in DeepSeek's attention, and those of its value; only the choice is made


def trial(dtype: str = "float32") -> list[dispatch.Choice]:
    """Traces and compiles the operations of a step for every block format and KV dtype, with activations in `dtype` and
    weights in the memory layout that loading would choose. For whole layers only the choice is made. Returns the dispatcher's
    record."""
    x = _array((_TOKENS, _SIZE), "float32" if dtype == "int8" else dtype)
    index, ids = _array((), "int32"), _array((_TOKENS,), "int32")
    with dispatch.record() as choices:
        for name in track(tuple(FORMATS), "trying the kernels, format"):
            memory_layout = choose(name, _SIZE, _SIZE, dispatch.target())
            shapes = LAYOUTS[memory_layout].plane_shapes(name, _SIZE, _SIZE)
            one, experts = (tuple(_array((*lead, *p.shape), p.dtype) for p in shapes) for lead in ((1,), (1, 2)))

            def matrix(planes: Any, index: Any, name: str = name, memory_layout: str = memory_layout) -> Any:
                return Matrix(planes, (), name, memory_layout, _SIZE, _SIZE).at(index)

            def mixture(x: Any, planes: Any, index: Any, ids: Any, weights: Any, matrix: Any = matrix) -> Any:
                experts = matrix(planes, index)
                return expert_ffn(x, ids, weights, experts, experts, experts, dtype)

            def product(x: Any, planes: Any, index: Any, matrix: Any = matrix) -> Any:
                return quantized_matmul(x, matrix(planes, index), dtype)

            backend_for(
                [Stack(one[0], name, memory_layout)], [{"query": Part(0, 0)}], _SIZE, LayerShape(_HEAD_DIM, 1e-6), dtype
            )
            _compile(product, x, one, index)
            lowered = jax.jit(mixture).lower(x, experts, index, _array((_TOKENS, 2), "int32"), _array((_TOKENS, 2), "float32"))
            if name == "Q4_K":  # the others get the same backends, and compiling all of them takes a minute
                lowered.compile()
        _compile(lambda x: route(x, x[:, 0] > 0, Router(2)), _array((_TOKENS, _SIZE), "float32"))

        q, kv = (_array((_TOKENS, heads, _HEAD_DIM), "float32") for heads in (_HEADS, _KV_HEADS))
        angles = _array((_TOKENS, 1, _HEAD_DIM // 2), "float32")
        tables = Tables(ids, _array((3,), "int32"), _array((2,), "int32"), _array((2, 1), "int32"))

        def attend(q: Any, k: Any, v: Any, cache: Any, layer: Any, kv_slots: Any, rope: Any, tables: Any) -> Any:
            q, cache = append(q, k, v, cache, layer, kv_slots, rope)
            return paged_attention(q, cache, layer, make_metadata(tables, cache, _HEADS), 1.0)

        for name in KV_DTYPES:
            cache = jax.eval_shape(functools.partial(KVCache.empty, 1, 2, 16, _KV_HEADS, _HEAD_DIM, name))
            _compile(attend, q, kv, kv, cache, index, ids, (angles, angles), tables)
            latent = jax.eval_shape(functools.partial(KVCache.empty, 1, 2, 16, 1, _LATENT[0], name, latent=True))
            jax.eval_shape(lambda cache, tables: make_metadata(tables, cache, _HEADS, value_dim=_LATENT[1]), latent, tables)
    return choices


def _array(shape: tuple[int, ...], dtype: str | np.dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _compile(function: Callable, *arguments: Any) -> None:
    jax.jit(function).lower(*arguments).compile()
