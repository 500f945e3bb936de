"""The gated delta net of a ragged batch (arXiv 2412.06464): a short convolution over time, then one matrix per head that each
token decays, corrects and reads.

Contract of `delta_net(qkv, log_decay, beta, taps, state, layer, sequences, tiled)`:

* `qkv` float32 [tokens, channels], as projected: of each of G key heads dk queries, then as many keys, then of each of H
  value heads dv values. H is a multiple of G. `taps` float32 [channels, K].
* `log_decay` float32 [tokens, H], at most 0; `beta` float32 [tokens, H].
* Channel c of token t becomes silu(sum over i of taps[c, i] * qkv[t - K + 1 + i, c]) within its sequence. Queries and keys are
  divided by their norm, x * rsqrt(sum of x^2 + 1e-6), queries also by sqrt(dk). Value head h has the key head h // (H / G);
  with `tiled` h % G.
* Per value head M [dk, dv] becomes exp(log_decay) M, then M + k (beta (v - k M)); the token's result is q M.
* `state`: a `DeltaState`. `layer`: int32 scalar. A sequence's state before its first token is zero if it `begins`, else the one
  at its place; the state after a token is written where `writes` says. Sequences do not write to each other's places.
* result: float32 [tokens, H, dv], zeros for a token without a sequence; and the state, updated in place if it was donated.
* derivatives: with respect to qkv, log_decay, beta and taps, of the result only: the state counts as a constant.

A token's result and the state after it depend on its sequence alone, and on CPU they have the same bits however the sequence
was cut into steps and whatever else is in the batch. So backends for CPU go from token to token, for one token as well as for
many: a form that takes a chunk of tokens at once rounds differently, and an unfinished chunk would have to be computed again at
each decoded token to get the bits of a prefill. Other backends may compute chunks that begin at multiples of a fixed number of
positions of the sequence (see `positions`), if the whole chunk is in the step and no state within it is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, native
from pallas_kernels.delta_net import xla
from pallas_kernels.delta_net.parts import DeltaState, Operands, Sequences
from pallas_kernels.derivatives import derivative_of

__all__ = ["BACKENDS", "DeltaState", "Sequences", "delta_net"]

BACKENDS = (
    dispatch.Backend("native", native.refuses, lambda: native),
    dispatch.kernels("triton", __name__, "gpu"),
    dispatch.kernels("mosaic_tpu", __name__, "tpu"),
    dispatch.Backend("xla", lambda case: None, lambda: xla),
)


def delta_net(
    qkv: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    taps: jax.Array,
    state: DeltaState,
    layer: jax.Array | int,
    sequences: Sequences,
    *,
    tiled: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, DeltaState]:
    """(float32 [tokens, H, dv], state). See the module's contract."""
    heads, dk, dv = state.memory.shape[2:]
    tokens, channels = qkv.shape
    keys = (channels - heads * dv) // (2 * dk)
    if (
        keys < 1
        or heads % keys
        or channels != 2 * keys * dk + heads * dv
        or state.tail.shape[2:] != (taps.shape[1] - 1, channels)
        or not log_decay.shape == beta.shape == (tokens, heads)
    ):
        shapes = ", ".join(str(array.shape) for array in (qkv, log_decay, beta, taps, *state))
        raise ValueError(f"delta_net: qkv, log_decay, beta, taps, tail and memory {shapes} do not fit")
    sequences = Sequences(*map(jnp.asarray, sequences))
    operands = Operands(qkv, log_decay, beta, taps, state, layer, sequences)
    return _delta_net(operands, tiled, dispatch.target("delta_net", implementation))


def _reference(operands: Operands, tiled: bool, target: dispatch.Target) -> tuple[jax.Array, DeltaState]:
    constant = jax.lax.stop_gradient(operands.state)
    return xla.differentiable(operands._replace(state=constant), tiled)


@derivative_of(_reference, static=("tiled", "target"))
def _delta_net(operands: Operands, tiled: bool, target: dispatch.Target) -> tuple[jax.Array, DeltaState]:
    shape = (*operands.qkv.shape, *operands.state.memory.shape[2:], operands.taps.shape[1])
    case = dispatch.Case("delta_net", target, "F32", "float32", shape=shape)
    return dispatch.choose(case, BACKENDS).delta_net(operands, tiled)
