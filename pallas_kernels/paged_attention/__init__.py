"""Attention of a ragged batch of queries over a paged KV cache, and the write of new keys and values into it.

Contract of `paged_attention(q, k_pages, v_pages, layer, plan, scale)`:

* `q` [tokens, q_heads, head_dim] float32: the queries of all sequences, one after the other.
* `k_pages`, `v_pages` [layers, pages, page_size, kv_heads, head_dim], float32 or float16, or bfloat16 bits as uint16
  (XLA on CPU rewrites a whole bfloat16 array at each update). q_heads is a multiple of kv_heads.
* `layer`: int32 scalar. `plan`: what `make_plan(tables, ...)` gives, once a step for all its layers.
* Query t of sequence s sees positions max(0, p - window + 1) .. p of its sequence, p = positions[t]; window 0 sees all.
* result [tokens, q_heads, head_dim] float32; rows of no sequence are zero.

Sums run over fixed ranges of positions in order, so a row's bits depend on that row, its sequence and its length alone.
Pages beyond a sequence's length are never read into a result, whatever they hold.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import xla

BACKENDS = (dispatch.Backend("xla", lambda case: None, xla),)


class Tables(NamedTuple):
    """Which query belongs to which sequence and where that sequence's pages are. All int32.

    positions [tokens]; query_starts [sequences + 1]: queries of s are query_starts[s] .. query_starts[s + 1] - 1;
    kv_lengths [sequences]: cached tokens, this step's included; page_table [sequences, max_pages].
    """

    positions: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array


def write_pages(pages: jax.Array, layer: jax.Array | int, slots: jax.Array, values: jax.Array) -> jax.Array:
    """Puts values [tokens, kv_heads, head_dim] at slots int32 [tokens] (page * page_size + offset; -1: nowhere)."""
    layers, count, page_size, heads, head_dim = pages.shape
    flat = pages.reshape(layers, count * page_size, heads, head_dim)
    values = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16) if pages.dtype == jnp.uint16 else values
    slots = jnp.where(slots < 0, count * page_size, slots)
    return flat.at[layer, slots].set(values.astype(pages.dtype), mode="drop").reshape(pages.shape)


def make_plan(tables: Tables, pages: jax.Array, window: int = 0):
    """The step's tables in the form that the backend for these `pages` (k or v) works from; an opaque pytree.

    window: positions a query sees, itself included; 0 for all.
    """
    return _backend(pages).plan(tables, pages.shape[2], window)


def paged_attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, layer: jax.Array | int, plan, scale: float
) -> jax.Array:
    """float32 [tokens, q_heads, head_dim]. See the module's contract."""
    if k_pages.shape != v_pages.shape or q.shape[-1] != k_pages.shape[-1] or q.shape[-2] % k_pages.shape[-2]:
        raise ValueError(f"paged_attention: q {q.shape}, k {k_pages.shape} and v {v_pages.shape} do not fit")
    return _attention(q, k_pages, v_pages, jnp.asarray(layer, jnp.int32), plan, scale)


def _backend(pages: jax.Array):
    format = "bfloat16" if pages.dtype == jnp.uint16 else pages.dtype.name
    return dispatch.choose(dispatch.Case("paged_attention", jax.default_backend(), format, "float32"), BACKENDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k_pages, v_pages, layer, plan, scale):
    return _backend(k_pages).attention(q, k_pages, v_pages, layer, plan, scale)


def _forward(q, k_pages, v_pages, layer, plan, scale):
    return _attention(q, k_pages, v_pages, layer, plan, scale), (q, k_pages, v_pages, layer, plan)


def _backward(scale, residuals, dy):
    q, k_pages, v_pages, layer, plan = residuals

    def static_loops(q, k_pages, v_pages):
        return _backend(k_pages).attention(q, k_pages, v_pages, layer, plan, scale, differentiable=True)

    return (*jax.vjp(static_loops, q, k_pages, v_pages)[1](dy), None, None)


_attention.defvjp(_forward, _backward)
