"""The loss of chosen tokens from their hidden states, with the vocabulary in tiles: the logits of a batch never exist.

Contract of `cross_entropy(hidden, targets, matrix, softcap)`:

* `hidden` [rows, columns]; its dtype is the arithmetic. `targets` int32 [rows], the token that follows; -1: the row does not
  count.
* `matrix`: a `Matrix` [vocab, columns] in any memory layout. With a `softcap` c logits l are c tanh(l / c).
* result float32 [rows]: the negative log-probability of each target, 0 where there is none.
* derivative: with respect to hidden.

Each tile of the matrix is unpacked once for all rows, and once more in the backward pass, which computes its logits again
(arXiv 2411.09009). At a time there are [rows, tile] logits and [tile, columns] weights, up to 64 MiB each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.layouts import open_axes, unpack_rows
from pallas_kernels.blocks.matrix import Matrix

_NUMBERS = 1 << 24  # in a tile


def cross_entropy(hidden: jax.Array, targets: jax.Array, matrix: Matrix, softcap: float = 0.0) -> jax.Array:
    """Negative log-probabilities of the targets. See the module's contract.

    Raises:
      ValueError: if shapes do not fit.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != matrix.columns or open_axes(matrix):
        raise ValueError(f"cross_entropy: hidden {hidden.shape}, targets {targets.shape} and {matrix} do not fit")
    return _losses(hidden, targets, matrix, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden: jax.Array, targets: jax.Array, matrix: Matrix, softcap: float) -> jax.Array:
    return _forward(hidden, targets, matrix, softcap)[0]


def _forward(hidden: jax.Array, targets: jax.Array, matrix: Matrix, softcap: float) -> tuple[jax.Array, jax.Array]:
    """The losses, and the logarithm of each row's sum of exponentials."""

    def step(ids: jax.Array, logits: jax.Array, _: jax.Array, carry: Any) -> Any:
        best, total, of_target = carry
        higher = jnp.maximum(best, logits.max(1))
        total = total * jnp.exp(best - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        return higher, total, of_target + jnp.where(ids == targets[:, None], logits, 0.0).sum(1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    best, total, of_target = _over_tiles(hidden, matrix, softcap, step, (zeros - jnp.inf, zeros, zeros))
    logs = best + jnp.log(total)
    return jnp.where(targets >= 0, logs - of_target, 0.0), logs


def _kept(hidden: jax.Array, targets: jax.Array, matrix: Matrix, softcap: float) -> tuple[jax.Array, Any]:
    losses, logs = _forward(hidden, targets, matrix, softcap)
    return losses, (hidden, targets, matrix, logs)


def _backward(softcap: float, kept: Any, dlosses: jax.Array) -> tuple[jax.Array, None, None]:
    hidden, targets, matrix, logs = kept
    dlosses = jnp.where(targets >= 0, dlosses, 0.0)[:, None]

    def step(ids: jax.Array, logits: jax.Array, weights: jax.Array, dhidden: jax.Array) -> jax.Array:
        slope = dlosses * (jnp.exp(logits - logs[:, None]) - (ids == targets[:, None]))
        if softcap:
            slope = jnp.where(ids >= 0, slope * (1 - (logits / softcap) ** 2), 0.0)
        return dhidden + _dot(slope.astype(hidden.dtype), weights, 0)

    return _over_tiles(hidden, matrix, softcap, step, jnp.zeros(hidden.shape, jnp.float32)).astype(hidden.dtype), None, None


_losses.defvjp(_kept, _backward)


def _over_tiles(hidden: jax.Array, matrix: Matrix, softcap: float, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(ids [1, tile], logits [rows, tile], weights [tile, columns], carry)` for each tile of the vocabulary. Where
    a tile repeats ids of the one before, they are -2 and their logits -inf."""
    rows = min(matrix.rows, max(128, _NUMBERS // max(hidden.shape)))

    def tile(i: jax.Array, carry: Any) -> Any:
        start = jnp.minimum(i * rows, matrix.rows - rows)
        ids = start + jnp.arange(rows)
        ids = jnp.where(ids >= i * rows, ids, -2)
        weights = unpack_rows(matrix, start, rows).astype(hidden.dtype)
        logits = _dot(hidden, weights, 1)
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        return step(ids[None], jnp.where(ids >= 0, logits, -jnp.inf), weights, carry)

    return lax.fori_loop(0, math.ceil(matrix.rows / rows), tile, carry)


def _dot(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)
