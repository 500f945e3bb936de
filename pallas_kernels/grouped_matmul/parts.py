"""What an expert may have in addition to its matrices, for the contract and its backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Biases(NamedTuple):
    """Of the products of E experts: gate and up float32 [E, n], down [E, k]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Clamp(NamedTuple):
    """Of a SwiGLU: see the contract."""

    limit: float
    alpha: float


def gated(
    products: Sequence[jax.Array], clamp: Clamp | None, sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
) -> jax.Array:
    """The SwiGLU of two products; a single one as it is."""
    if len(products) == 1:
        return products[0]
    gate, up = products
    if clamp is None:
        return gate * sigmoid(gate) * up
    gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit)
    return (up + 1) * (gate * sigmoid(clamp.alpha * gate))
