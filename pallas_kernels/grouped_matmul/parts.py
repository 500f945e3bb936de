"""What an expert may have in addition to its matrices, for the contract and its backends."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Biases(NamedTuple):
    """Of the products of E experts: gate and up float32 [E, n], down [E, k]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Clamp(NamedTuple):
    """Of a SwiGLU: see the contract."""

    limit: float
    alpha: float
