"""`loss`: the mean negative log-likelihood of chosen tokens, as a pure function of an adapter.

The base weights stay compressed and get no derivative. Neither a matrix of scores of all tokens nor the logits of all tokens
ever exist (`pallas_kernels.segment_attention`, `pallas_kernels.cross_entropy`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ferrum_jax.config import ModelConfig
from ferrum_jax.finetune.lora import LoraAdapter
from ferrum_jax.models.decoder import Params, unembedding
from ferrum_jax.models.packed import hidden
from pallas_kernels.blocks.ordered import natural
from pallas_kernels.cross_entropy import cross_entropy


class PackedBatch(NamedTuple):
    """Whole sequences one after the other. All int32, NumPy's or JAX's.

    Attributes:
      tokens: [T], the ids; padding comes last.
      starts: [S + 1]; sequence s is tokens starts[s] .. starts[s + 1] - 1. A token sees those before it in its sequence.
      rows: [R], the tokens after which there is a target.
      targets: [R], the id that follows each; -1 for none.
    """

    tokens: Any
    starts: Any
    rows: Any
    targets: Any


def loss(params: Params, adapter: LoraAdapter, batch: PackedBatch, *, config: ModelConfig) -> jax.Array:
    """The mean negative log-likelihood of the targets. Differentiable with respect to the adapter.

    Args:
      params: the model's parameters.
      adapter: as `init` makes it.
      batch: as `pack` makes it, one of its packs.
      config: the model's configuration; static. The arithmetic "int8" counts as "float32", because its rounding has no
        derivative.

    Returns:
      float32 scalar; 0 if there are no targets.
    """
    total, count = summed(params, adapter, batch, config)
    return total / jnp.maximum(count, 1)


def summed(params: Params, adapter: LoraAdapter, batch: PackedBatch, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The sum over the targets, float32, and their number, int32."""
    config = dataclasses.replace(config, dtype=config.activations)
    after = hidden(params, adapter.pairs, adapter.config.scale, batch.tokens, batch.starts, config=config)
    rows, matrix = natural(after[batch.rows].astype(config.activations), unembedding(params).operand())
    losses = cross_entropy(rows, batch.targets, matrix, config.logit_softcap)
    return losses.sum(), jnp.sum(batch.targets >= 0, dtype=jnp.int32)
