"""The gated delta net of packed sequences, for training: there is no state, and all of it has derivatives.

Contract of `packed_delta_net(qkv, log_decay, beta, taps, first, shape, tiled)`:

* `qkv`, `log_decay`, `beta`, `taps` and `tiled`: as of `delta_net`. `shape`: (H, dk, dv).
* `first` int32 [tokens]: the first token of each one's sequence; for padding `tokens`.
* result: float32 [tokens, H, dv], that of `delta_net` for sequences that begin; for padding any numbers.
* derivatives: with respect to qkv, log_decay, beta and taps.

The idea is that of chunks.py, products of matrices over the tokens of a chunk. Here chunks lie in the batch and not in a
sequence: between tokens of two sequences D is 0. What the backward pass keeps is the memory before each chunk; the rest is
computed again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from pallas_kernels.delta_net.xla import heads_of

_CHUNK = 64
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def packed_delta_net(
    qkv: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    taps: jax.Array,
    first: jax.Array,
    shape: tuple[int, int, int],
    *,
    tiled: bool = False,
) -> jax.Array:
    """float32 [tokens, H, dv]. See the module's contract."""
    tokens = qkv.shape[0]
    q, k, v = heads_of(jax.nn.silu(convolved(qkv, taps, first)), shape, tiled)
    size = min(_CHUNK, tokens)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, -tokens % size), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(-1, size, *x.shape[1:])

    begins = jnp.pad(first, (0, -tokens % size), constant_values=tokens).reshape(-1, size)
    starts = size * jnp.arange(len(begins), dtype=jnp.int32)
    parts = *(cut(x).swapaxes(1, 2) for x in (q, k, v, log_decay, beta)), begins, starts  # [chunks, H, size, ...]
    _, out = lax.scan(jax.checkpoint(_chunk), jnp.zeros(shape, jnp.float32), parts)
    return out.swapaxes(1, 2).reshape(-1, *out.shape[1::2])[:tokens]


def convolved(x: jax.Array, taps: jax.Array, first: jax.Array) -> jax.Array:
    """The sum over i of taps[c, i] * x[t - K + 1 + i, c] within each token's sequence: [tokens, channels], as x has. taps
    [channels, K]; first: as above."""
    place, count = jnp.arange(x.shape[0]), taps.shape[1]
    earlier = (
        jnp.where((place - back >= first)[:, None], jnp.roll(x, back, axis=0), 0.0) * taps[:, count - 1 - back]
        for back in range(count - 1, 0, -1)
    )
    return functools.reduce(jnp.add, (*earlier, x * taps[:, -1]))


def _chunk(memory: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The memory [H, dk, dv] after a chunk, and its results [H, C, dv]. part: q, k [H, C, dk], v [H, C, dv], log_decay, beta
    [H, C], the first token of each one's sequence [C], and the chunk's own."""
    q, k, v, log_decay, beta, begins, start = part
    size = begins.shape[0]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
    # Sums of numbers of one sign, never differences, so nothing cancels.
    until = jnp.where(column <= row, log_decay[:, None], 0.0)  # [H, C, C]
    between = _einsum("him,mj->hij", until, (row > column).astype(jnp.float32))
    together = (begins[:, None] == begins[None]) & (column <= row)
    decay = jnp.where(together, jnp.exp(between), 0.0)  # D(i, j)
    since = jnp.where(begins < start, jnp.exp(until.sum(2)), 0.0)[..., None]  # D(i)
    lower = jnp.where(row > column, beta[..., None] * decay * _einsum("hid,hjd->hij", k, k), 0.0)
    corrected = beta[..., None] * (v - since * _einsum("hid,hdv->hiv", k, memory))
    wrong = solve_triangular(lower + jnp.eye(size), corrected, lower=True, unit_diagonal=True)
    seen = decay * _einsum("hid,hjd->hij", q, k)
    result = since * _einsum("hid,hdv->hiv", q, memory) + _einsum("hij,hjv->hiv", seen, wrong)
    after = decay[:, -1, :, None] * wrong  # D(last, i)
    return since[:, -1:] * memory + _einsum("hid,hiv->hdv", k, after), result
