"""Steps of the gated delta nets of Qwen3.5-35B-A3B, to compile: four layers, each of which gets what the one before gave."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta_net import DeltaState, Sequences, delta_net

LAYERS, PLACES, HEADS, KEY_HEADS, WIDTH, TAPS = 4, 40, 32, 16, 128, 4
CHANNELS = (2 * KEY_HEADS + HEADS) * WIDTH
TAIL_BYTES = 4 * LAYERS * PLACES * 8 * CHANNELS  # filled up to eight rows
BATCHES = {"decode": (8, 8), "mixed": (512, 8)}  # name: tokens, sequences


def step(state: DeltaState, qkv: Any, log_decay: Any, beta: Any, taps: Any, sequences: Sequences) -> Any:
    """To be compiled with the state donated."""

    def body(carry: Any, layer: Any) -> Any:
        x, state = carry
        y, state = delta_net(x, log_decay, beta, taps[layer], state, layer, sequences, tiled=True)
        return (x.at[:, -HEADS * WIDTH :].add(y.reshape(x.shape[0], -1)), state), None

    return jax.lax.scan(body, (qkv, state), jnp.arange(LAYERS, dtype=jnp.int32))[0]


def arguments(batch: str) -> tuple[Any, ...]:
    """Of `step`, abstract."""
    tokens, count = BATCHES[batch]
    state = DeltaState(_f32(LAYERS, PLACES, TAPS - 1, CHANNELS), _f32(LAYERS, PLACES, HEADS, WIDTH, WIDTH))
    sequences = Sequences(_i32(count + 1), _i32(tokens), jax.ShapeDtypeStruct((count,), bool), _i32(count), _i32(tokens))
    gates = _f32(tokens, HEADS)
    return state, _f32(tokens, CHANNELS), gates, gates, _f32(LAYERS, CHANNELS, TAPS), sequences


def room(batch: str) -> int:
    """Bytes of temporaries: two rows of channels of each token, its queries, keys, values and results by value head, and gates,
    which a TPU fills up to 128 lanes (or the squares of chunks on a GPU); and of each sequence two tails, filled up."""
    tokens, count = BATCHES[batch]
    return 4 * tokens * (2 * CHANNELS + 4 * HEADS * WIDTH + 2 * HEADS * 128) + 4 * count * 16 * CHANNELS + (1 << 20)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
