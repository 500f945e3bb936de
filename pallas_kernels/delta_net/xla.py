"""The gated delta net in plain XLA, token by token.

XLA must compile the same loop over tokens for any step, or sums would round differently. So its length is not known while
compiling, because XLA would merge a loop with a single iteration into the code around it. And there are at least two tokens to
choose from, because XLA would compute everything that depends on a single one before the loop.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_net.parts import DeltaState, Operands
from pallas_kernels.reductions import exp, row_sum, silu, term

Kept = tuple[jax.Array, ...]  # the tail [K - 1, channels] and the memory [H, dk, dv] of one sequence
_EPS = 1e-6


def delta_net(operands: Operands, tiled: bool) -> tuple[jax.Array, DeltaState]:
    """As the package's contract says."""
    qkv, log_decay, beta, taps, state, layer, sequences = operands
    heads, _, value_dim = state.memory.shape[2:]
    tokens, places = qkv.shape[0], state.memory.shape[1]
    if tokens == 1:
        qkv, log_decay, beta = (jnp.pad(array, ((0, 1), (0, 0))) for array in (qkv, log_decay, beta))
    Carry = tuple[jax.Array, Kept]

    def sequence(number: jax.Array, carry: Carry) -> Carry:
        before = tuple(array.at[layer, sequences.reads[number]].get(mode="clip") for array in carry[1])
        before = tuple(jnp.where(sequences.begins[number], 0.0, array) for array in before)

        def token(t: jax.Array, inner: tuple[Kept, Carry]) -> tuple[Kept, Carry]:
            kept, (out, arrays) = inner
            kept, y = _step(kept, qkv[t], log_decay[t], beta[t], taps, tiled)
            place = jnp.where(sequences.writes[t] < 0, places, sequences.writes[t])
            arrays = tuple(array.at[layer, place].set(new, mode="drop") for array, new in zip(arrays, kept, strict=True))
            return kept, (out.at[t].set(y), arrays)

        return lax.fori_loop(sequences.starts[number], sequences.starts[number + 1], token, (before, carry))[1]

    out = jnp.zeros((tokens, heads, value_dim), jnp.float32)
    out, kept = lax.fori_loop(0, sequences.reads.shape[0], sequence, (out, tuple(state)))
    return out, DeltaState(*kept)


def differentiable(operands: Operands, tiled: bool) -> tuple[jax.Array, DeltaState]:
    """The result by a loop of a known length, and the unchanged state."""
    qkv, log_decay, beta, taps, state, layer, sequences = operands
    count = sequences.reads.shape[0]
    token = jnp.arange(qkv.shape[0])
    row = jnp.clip(jnp.searchsorted(sequences.starts, token, side="right") - 1, 0, count - 1)
    first, live = token == sequences.starts[row], token < sequences.starts[-1]

    def before(array: jax.Array, number: jax.Array) -> jax.Array:
        return jnp.where(sequences.begins[number], 0.0, array.at[layer, sequences.reads[number]].get(mode="clip"))

    @jax.checkpoint
    def step(kept: Kept, inputs: tuple[jax.Array, ...]) -> tuple[Kept, jax.Array]:
        number, begins, *given = inputs
        kept = tuple(jnp.where(begins, before(array, number), old) for array, old in zip(state, kept, strict=True))
        token_qkv, token_decay, token_beta = given
        return _step(kept, token_qkv, token_decay, token_beta, taps, tiled)

    zeros = tuple(jnp.zeros(array.shape[2:], jnp.float32) for array in state)
    _, out = lax.scan(step, zeros, (row, first, qkv, log_decay, beta))
    return jnp.where(live[:, None, None], out, 0.0), state


def _step(
    kept: Kept, qkv: jax.Array, log_decay: jax.Array, beta: jax.Array, taps: jax.Array, tiled: bool
) -> tuple[Kept, jax.Array]:
    """One token: what is kept after it, and its result [H, dv]."""
    tail, memory = kept
    window = jnp.concatenate([tail, qkv[None]])
    mixed = silu(functools.reduce(jnp.add, (term(window[i], taps[:, i]) for i in range(taps.shape[1]))))
    q, k, v = heads_of(mixed, memory.shape, tiled)
    memory = term(memory, exp(log_decay)[:, None, None])
    wrong = beta[:, None] * (v - _read(memory, k))
    memory = memory + term(k[:, :, None], wrong[:, None, :])
    return (window[1:], memory), _read(memory, q)


def heads_of(mixed: jax.Array, memory: tuple[int, ...], tiled: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k [..., H, dk], normalized, and v [..., H, dv] of the channels [..., C] after the convolution. memory: (H, dk, dv)."""
    heads, key_dim, value_dim = memory
    width = mixed.shape[-1] - heads * value_dim
    q, k = jnp.moveaxis(mixed[..., :width].reshape(*mixed.shape[:-1], 2, -1, key_dim), -3, 0)
    q, k = _normed(q) * key_dim**-0.5, _normed(k)
    times = heads // q.shape[-2]
    q, k = (jnp.concatenate([x] * times, axis=-2) if tiled else jnp.repeat(x, times, axis=-2) for x in (q, k))
    return q, k, mixed[..., width:].reshape(*mixed.shape[:-1], heads, value_dim)


def _normed(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(row_sum(term(x, x)) + _EPS)


def _read(memory: jax.Array, key: jax.Array) -> jax.Array:
    """[H, dv]: what a key [H, dk] finds in each head's memory."""
    return jnp.einsum("hkv,hk->hv", memory, key, precision=lax.Precision.HIGHEST)
