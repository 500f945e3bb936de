"""What a gated delta net reads and writes, for its contract and its backends."""

from __future__ import annotations

from typing import NamedTuple

import jax


class DeltaState(NamedTuple):
    """The states of sequences, float32.

    Attributes:
      tail: [layers, places, K - 1, channels], the last rows of qkv, the newest last.
      memory: [layers, places, H, dk, dv].
    """

    tail: jax.Array
    memory: jax.Array


class Sequences(NamedTuple):
    """Of S sequences of a batch. int32 unless stated.

    Attributes:
      starts: [S + 1]; tokens of s are starts[s] .. starts[s + 1] - 1.
      positions: [tokens], of each token in its sequence.
      begins: bool [S], whether the sequence has no state yet.
      reads: [S], the place of its state.
      writes: [tokens], the place for the state after each token, -1 for nowhere.
    """

    starts: jax.Array
    positions: jax.Array
    begins: jax.Array
    reads: jax.Array
    writes: jax.Array


class Operands(NamedTuple):
    """The arrays of `delta_net`: see the package's contract."""

    qkv: jax.Array
    log_decay: jax.Array
    beta: jax.Array
    taps: jax.Array
    state: DeltaState
    layer: jax.Array | int
    sequences: Sequences
