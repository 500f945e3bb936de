"""A layer that recurs by a short convolution over time, gated before and after.

All tokens of a step are computed at once: a token reads the inputs before it from the step, or from the tail that its sequence
keeps. Which of the two it was makes no difference to the sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import ShortConv as ShortConvSpec
from ferrum_jax.models.layers import MIXERS, Index, LayerModule, Packed
from ferrum_jax.models.recurrence import Recurrence
from ferrum_jax.quantized import Layer
from pallas_kernels.blocks import format_of
from pallas_kernels.delta_net.packed import convolved


class ShortConv(LayerModule):
    """Parameters: matrices `into`, with the rows of the gate before the convolution, then of the gate after it, then of the
    values, and `output`; `taps` [width, taps], the last one of the token itself."""

    spec: ShortConvSpec

    def __call__(
        self,
        x: jax.Array,
        part: dict[str, jax.Array],
        layer: Layer,
        index: Index,
        told: Recurrence | Packed,
        adapter_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `MIXERS` says."""
        with jax.named_scope("into"):
            (projected,) = self.project(x, layer, "into", adapter_mask=adapter_mask)
            before, after, values = jnp.split(projected, 3, axis=-1)
        stack, at = self.stack("taps").select(layer)
        taps = format_of(stack.format).decode(stack.planes[0][at])
        with jax.named_scope("recurrence"):
            if isinstance(told, Packed):
                y = convolved(before * values, taps, told.first)
            else:
                y, part = self.recurring(before * values, taps, part, index, told)
        with jax.named_scope("output"):
            return self.project(after * y, layer, "output", adapter_mask=adapter_mask)[0], part

    def recurring(
        self, inputs: jax.Array, taps: jax.Array, part: dict[str, jax.Array], index: Index, told: Recurrence
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """inputs [tokens, width] through taps [width, taps], and the tails after it."""
        tail = told.read(part["tail"], index)
        place = jnp.arange(len(inputs)) - told.starts[told.row]  # of each token among its sequence's in the step

        def earlier(steps: int) -> jax.Array:
            """The input that many tokens before each: [tokens, width]."""
            kept = tail[told.row, jnp.clip(tail.shape[1] + place - steps, 0, tail.shape[1] - 1)]
            return jnp.where((place >= steps)[:, None], jnp.roll(inputs, steps, axis=0), kept)

        window = [*(earlier(steps) for steps in range(self.spec.taps - 1, 0, -1)), inputs]
        # A loop, because XLA writes the sum of two products with either of them fused, by the shapes around it.
        stacked = jnp.stack(window)
        y = lax.fori_loop(0, len(window), lambda i, y: y + stacked[i] * taps[:, i], jnp.zeros_like(inputs))
        return y, {"tail": told.write(part["tail"], index, jnp.stack(window[1:], axis=1))}


MIXERS[ShortConvSpec] = "short_conv", ShortConv
