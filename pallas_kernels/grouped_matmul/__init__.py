"""Ragged grouped matmul over compressed experts: each run of rows is multiplied by its own expert's matrix.

Contract of `grouped_matmul(x, group_sizes, experts)`:

* `x` [m, k], rows sorted by expert; its dtype is the arithmetic, as in quantized_matmul.
* `group_sizes` int32 [E]: how many rows each expert has. The results of rows beyond their sum are zero.
* `experts`: a `Matrix` [n, k] with one stack axis, the experts, left without an index.
* result [m, n] float32. An expert without rows is neither unpacked nor multiplied: the contents of its blocks cannot matter,
  and time and temporaries do not grow with the number of experts. Row i depends on row i of x and its expert alone.
* derivative: with respect to x.

Contract of `matmul_by_head(x, heads)`, in which every row has one product with each matrix:

* `x` [tokens, heads, k]; `heads`: a `Matrix` [n, k] with one stack axis, left without an index. arithmetic: as in
  quantized_matmul, "int8x2" included.
* result [tokens, heads, n] float32. Row i depends on row i of x alone.
* derivative: with respect to x.

Contract of `expert_ffn(x, expert_ids, expert_weights, gate, up, down, biases, clamp, activation)`, a whole mixture-of-experts
feed-forward:

* `x` [tokens, k]; `expert_ids` int32 [tokens, top_k], E if a token is padding; `expert_weights` float32 [tokens, top_k].
* gate, up: experts [n, k]; down: experts [k, n]. `biases`: of the three products of each expert, or None.
* result float32 [tokens, k]: for each token the sum over its ranks, in their order, of weight * down(silu(gate x) * up x);
  with a `clamp`, of weight * down((u + 1) * g * sigmoid(alpha * g)), g = min(gate x, limit) and u = clip(up x, -limit,
  limit) (arXiv 2508.10925); with the activation "gelu_tanh", of weight * down(gelu(gate x) * up x). Rows are sorted by expert
  on the device, stably. `adapters`: pairs that are added to the three products of each expert.
* derivative: with respect to x, expert_weights and the adapters.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, native
from pallas_kernels.blocks.layouts import open_axes
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.ordered import is_ordered, natural_rows
from pallas_kernels.derivatives import derivative_of, linear
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_matmul.factors import ExpertAdapters, Pair, grouped_factor
from pallas_kernels.grouped_matmul.grouping import group
from pallas_kernels.grouped_matmul.parts import Biases, Clamp, gated
from pallas_kernels.quantized_matmul import backend_for
from pallas_kernels.reductions import gelu, sigmoid, term

BACKENDS = (
    dispatch.Backend("native", native.refuses, lambda: native),
    dispatch.kernels("triton", __name__, "gpu"),
    dispatch.kernels("mosaic_tpu", __name__, "tpu"),
    dispatch.Backend("xla", lambda case: None, lambda: xla),
)
EXPERT_BACKENDS = (*BACKENDS[:-1], dispatch.composed("grouped_matmul"))
HEAD_BACKENDS = (dispatch.Backend("native", native.refuses, lambda: native), dispatch.composed("grouped_matmul"))


def grouped_matmul(
    x: jax.Array,
    group_sizes: jax.Array,
    experts: Matrix,
    arithmetic: str = "",
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Row r of x times the transposed matrix of its expert. See the module's contract.

    Args:
      x: [m, k], rows sorted by expert.
      group_sizes: int32 [E], rows of each expert.
      experts: [n, k] for each of E experts, compressed.
      arithmetic: "int8"; "": the dtype of x.
      implementation: the backend to take instead of the first that can.

    Returns:
      float32 [m, n].

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    _check("grouped_matmul", x, experts, group_sizes.shape[0])
    x, experts = natural_rows(x, group_sizes, experts)
    return _grouped(x, group_sizes, experts, dispatch.target("grouped_matmul", implementation), arithmetic or x.dtype.name)


def matmul_by_head(
    x: jax.Array, heads: Matrix, arithmetic: str = "", implementation: dispatch.Implementation = None
) -> jax.Array:
    """Each head's rows of x times the transposed matrix of that head. See the module's contract.

    Args:
      x: [tokens, heads, k].
      heads: [n, k] for each head, compressed.
      arithmetic: "int8x2"; "": the dtype of x.
      implementation: the backend to take; may be "composed".

    Returns:
      float32 [tokens, heads, n].

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    if x.ndim != 3 or x.shape[2] != heads.columns or open_axes(heads) != (x.shape[1],) or is_ordered(heads):
        raise ValueError(f"matmul_by_head: x {x.shape} and {open_axes(heads)} {heads} do not fit")
    return _by_head(x, heads, dispatch.target("matmul_by_head", implementation), arithmetic or x.dtype.name)


def expert_ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    arithmetic: str = "",
    implementation: dispatch.Implementation = None,
    *,
    biases: Biases | None = None,
    clamp: Clamp | None = None,
    adapters: ExpertAdapters | None = None,
    activation: str = "silu",
) -> jax.Array:
    """A whole mixture-of-experts feed-forward. See the module's contract.

    Args:
      x: [tokens, k].
      expert_ids: int32 [tokens, top_k], the chosen experts; the id E is padding.
      expert_weights: float32 [tokens, top_k].
      gate: [n, k] for each of E experts, compressed.
      up: [n, k] for each of E experts, compressed.
      down: [k, n] for each of E experts, compressed.
      arithmetic: "int8"; "": the dtype of x.
      implementation: the backend to take; may be "composed".
      biases: of the products; None: there are none.
      clamp: of the SwiGLU; None: it has none.
      adapters: of the products; None: there are none.
      activation: "silu" or "gelu_tanh".

    Returns:
      float32 [tokens, k].

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    (count,) = open_axes(gate)
    for matrix in (gate, up):
        _check("expert_ffn", x, matrix, count)
    if (gate.rows, down.rows) != (up.rows, x.shape[1]) or (down.columns, open_axes(down)) != (gate.rows, (count,)):
        raise ValueError(f"expert_ffn: gate {gate}, up {up} and down {down} do not fit")
    shape = expert_ids.shape
    if shape != expert_weights.shape or shape[:1] != x.shape[:1]:
        raise ValueError(f"expert_ffn: x {x.shape}, expert_ids {shape} and expert_weights {expert_weights.shape} do not fit")
    if biases is not None and [bias.shape for bias in biases] != [(count, m.rows) for m in (gate, up, down)]:
        raise ValueError(f"expert_ffn: biases {[bias.shape for bias in biases]} of {count} experts {gate}, {up} and {down}")
    biases = biases and Biases(*map(jnp.asarray, biases))
    target = dispatch.target("expert_ffn", implementation)
    static = clamp, activation, target, arithmetic or x.dtype.name
    if adapters is not None or any(map(is_ordered, (gate, up, down))):
        return _composed_ffn(x, expert_ids, expert_weights, gate, up, down, biases, *static, adapters)
    return _expert_ffn(x, expert_ids, expert_weights, gate, up, down, biases, *static)


def _check(operation: str, x: jax.Array, matrix: Matrix, experts: int) -> None:
    if x.ndim != 2 or x.shape[1] != matrix.columns or open_axes(matrix) != (experts,):
        raise ValueError(f"{operation}: x {x.shape} and {open_axes(matrix)} {matrix} do not fit for {experts} experts")


def _transposed(dy: jax.Array, group_sizes: jax.Array, experts: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    return xla.grouped(dy, group_sizes, experts, target, transposed=True)


@linear(_transposed, static=("target", "arithmetic"))
def _grouped(x: jax.Array, group_sizes: jax.Array, experts: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    backend = backend_for("grouped_matmul", x, (experts,), target, arithmetic, BACKENDS)
    return backend.grouped(x, group_sizes, experts, target)


def _head_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of x [tokens, heads, k] by head, and how many each has."""
    tokens, heads, k = x.shape
    return x.swapaxes(0, 1).reshape(heads * tokens, k), jnp.full(heads, tokens, jnp.int32)


def _by_head_transposed(dy: jax.Array, heads: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    dx = xla.grouped(*_head_rows(dy), heads, target, transposed=True)
    return dx.reshape(dy.shape[1], dy.shape[0], -1).swapaxes(0, 1)


@linear(_by_head_transposed, static=("target", "arithmetic"))
def _by_head(x: jax.Array, heads: Matrix, target: dispatch.Target, arithmetic: str) -> jax.Array:
    backend = backend_for("matmul_by_head", x, (heads,), target, arithmetic, HEAD_BACKENDS)
    if backend is not None:
        return backend.matmul_by_head(x, heads, target)
    y = _grouped(*_head_rows(x), heads, target, arithmetic)
    return y.reshape(x.shape[1], x.shape[0], -1).swapaxes(0, 1)


def _composed_ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    biases: Biases | None,
    clamp: Clamp | None,
    activation: str,
    target: dispatch.Target,
    arithmetic: str,
    adapters: ExpertAdapters | None = None,
) -> jax.Array:
    """One grouped product after the other, each by a backend that serves it."""
    tokens, top_k = expert_ids.shape
    groups = group(expert_ids.reshape(-1), open_axes(gate)[0], tile_rows=16)
    chosen = expert_ids.reshape(-1)[groups.order]

    def product(rows: jax.Array, matrix: Matrix, bias: jax.Array | None, pair: Pair | None) -> jax.Array:
        stored, natural = natural_rows(rows, groups.sizes, matrix)
        y = _grouped(stored, groups.sizes, natural, target, arithmetic)
        y = y if bias is None else y + bias.at[chosen].get(mode="fill", fill_value=0)
        return y if pair is None else y + grouped_term(rows, groups.sizes, pair, token, target)

    token = groups.order // top_k
    rows = x[token]
    of_gate, of_up, of_down = zip(biases or (None,) * 3, adapters or (None,) * 3, strict=True)
    products = product(rows, gate, *of_gate), product(rows, up, *of_up)
    hidden = gated(products, clamp, sigmoid) if activation == "silu" else gelu(products[0]) * products[1]
    y = product(hidden.astype(x.dtype), down, *of_down)[groups.place].reshape(tokens, top_k, -1)
    return functools.reduce(jnp.add, (term(y[:, rank], expert_weights[:, rank, None]) for rank in range(top_k)))


def grouped_term(x: jax.Array, group_sizes: jax.Array, pair: Pair, token: jax.Array, target: dispatch.Target) -> jax.Array:
    """What the pairs of the experts add to a grouped product of x [m, k], whose rows are of these tokens: float32 [m, n]."""

    def times(rows: jax.Array, factor: jax.Array | Matrix) -> jax.Array:
        if isinstance(factor, Matrix):
            return _grouped(rows, group_sizes, factor, target, "float32")
        return grouped_factor(rows, group_sizes, factor)

    inner = pair.scale * times(x.astype(jnp.float32), pair.a)
    return times(inner if pair.mask is None else jnp.where(pair.mask[token], inner, 0.0), pair.b)


@derivative_of(_composed_ffn, of=("x", "expert_weights"), static=("clamp", "activation", "target", "arithmetic"))
def _expert_ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    biases: Biases | None,
    clamp: Clamp | None,
    activation: str,
    target: dispatch.Target,
    arithmetic: str,
) -> jax.Array:
    features = () if activation == "silu" else ("GELU",)
    backend = backend_for("expert_ffn", x, (gate, up, down), target, arithmetic, EXPERT_BACKENDS, features)
    if backend is None:
        return _composed_ffn(x, expert_ids, expert_weights, gate, up, down, biases, clamp, activation, target, arithmetic)
    return backend.expert_ffn(x, expert_ids, expert_weights, gate, up, down, target, biases, clamp)
