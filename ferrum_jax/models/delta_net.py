"""A layer that recurs by a gated delta net: projections, pallas_kernels.delta_net, gated norm and projection."""

from __future__ import annotations

import jax

from ferrum_jax.config import GatedDeltaNet as GatedDeltaNetSpec
from ferrum_jax.models.layers import MIXERS, Index, LayerModule, Packed
from ferrum_jax.models.recurrence import Recurrence
from ferrum_jax.quantized import Layer
from pallas_kernels.blocks import format_of
from pallas_kernels.delta_net import DeltaState, Sequences, delta_net
from pallas_kernels.delta_net.packed import packed_delta_net
from pallas_kernels.reductions import rms_norm, sigmoid, silu, softplus


class GatedDeltaNet(LayerModule):
    """Parameters: matrices `qkv`, `gate` and `output`; `beta` and `alpha`, or both in `beta_alpha`, which has for each key head
    the rows of beta, then of alpha, of its value heads; `taps` [channels, taps]; vectors `decay` (negative), `time_bias` and
    `norm`."""

    spec: GatedDeltaNetSpec

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
        spec, tokens = self.spec, x.shape[0]
        with jax.named_scope("qkv"):
            qkv, gate = self.project(x, layer, "qkv", "gate", adapter_mask=adapter_mask)
        with jax.named_scope("gates"):
            beta, alpha = self.gates(x, layer, adapter_mask)
            time = softplus(alpha + self.stack("time_bias").vector(layer))
            log_decay = self.stack("decay").vector(layer) * time
        with jax.named_scope("recurrence"):
            stack, at = self.stack("taps").select(layer)
            given = qkv, log_decay, sigmoid(beta), format_of(stack.format).decode(stack.planes[0][at])
            if isinstance(told, Packed):
                shape = spec.value_heads, spec.key_dim, spec.value_dim
                y = packed_delta_net(*given, told.first, shape, tiled=spec.tiled)
            else:
                states = DeltaState(part["tail"], part["memory"]), index, sequences_of(told)
                y, kept = delta_net(*given, *states, tiled=spec.tiled, implementation=self.config.implementation)
                part = kept._asdict()
        with jax.named_scope("output"):
            y = rms_norm(y, self.stack("norm").vector(layer), self.config.rms_norm_eps)
            y = y * silu(gate.reshape(y.shape))
            return self.project(y.reshape(tokens, -1), layer, "output", adapter_mask=adapter_mask)[0], part

    def gates(self, x: jax.Array, layer: Layer, adapter_mask: jax.Array | None) -> list[jax.Array]:
        """beta and alpha before their functions: float32 [tokens, value_heads] each."""
        # int8 would lose most here, because these are exponents; and the matrices are small.
        arithmetic = "int8x2" if self.config.dtype == "int8" else self.config.dtype
        if self.stack("beta_alpha") is None:
            return self.project(x, layer, "beta", "alpha", adapter_mask=adapter_mask, arithmetic=arithmetic)
        (both,) = self.project(x, layer, "beta_alpha", adapter_mask=adapter_mask, arithmetic=arithmetic)
        both = both.reshape(x.shape[0], self.spec.key_heads, 2, -1)
        return [both[:, :, i].reshape(x.shape[0], -1) for i in range(2)]


def sequences_of(told: Recurrence) -> Sequences:
    """The part of it that kernels are given."""
    return Sequences(told.starts, told.positions, told.begins, told.reads, told.writes)


MIXERS[GatedDeltaNetSpec] = "delta_net", GatedDeltaNet
