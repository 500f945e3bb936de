"""A mixer that recurs, small enough to be exact, for tests of the engine's recurrent state.

For tokens x_t: u_t = W x_t, v_t = u_t + u_(t-1) / 2 + u_(t-2) / 4 (a convolution with a tail of two), h_t = h_(t-1) / 2 + v_t,
and the result is V h_t. All factors are powers of two, so fused products do not round differently, and the scan goes token by
token: the bits do not depend on how a text was cut.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import Recurrent
from ferrum_jax.models.layers import MIXERS, LayerModule
from ferrum_jax.models.recurrence import Recurrence
from ferrum_jax.quantized import Layer, linear


@dataclasses.dataclass(frozen=True)
class Toy(Recurrent):
    """`width` numbers that recur."""

    width: int

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {"state": (self.width,), "tail": (2, self.width)}


class ToyMixer(LayerModule):
    """Parameters: `into` [width, hidden_size] and `out` [hidden_size, width]."""

    spec: Toy

    def __call__(self, x, part: dict[str, jax.Array], layer: Layer, index, told: Recurrence, adapter_mask=None):
        before = {name: told.read(array, index) for name, array in part.items()}

        def token(carry, inputs):
            u, row, first = inputs
            state, tail = (jnp.where(first, before[name][row], old) for name, old in zip(("state", "tail"), carry, strict=True))
            state = state / 2 + (u + tail[1] / 2 + tail[0] / 4)
            after = state, jnp.stack([tail[1], u])
            return after, after

        zeros = tuple(jnp.zeros(before[name].shape[1:], jnp.float32) for name in ("state", "tail"))
        _, (states, tails) = lax.scan(token, zeros, (linear(x, self.stack("into"), layer), told.row, told.first))
        kept = {"state": states, "tail": tails}
        return linear(states, self.stack("out"), layer), {n: told.write(a, index, kept[n]) for n, a in part.items()}


MIXERS[Toy] = "toy", ToyMixer
