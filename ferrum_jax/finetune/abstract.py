"""A step of training as shapes alone, for compilers of devices that are not there (`ferrum_jax.plan`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.config import ModelConfig
from ferrum_jax.finetune.lora import LoraConfig, init_for
from ferrum_jax.finetune.objective import PackedBatch
from ferrum_jax.finetune.training import adam, step_of

_SEQUENCES = 16  # of a pack; their number costs nothing


def abstract_step(
    params: Mapping[str, Any], model: ModelConfig, config: LoraConfig, length: int, packs: int
) -> tuple[Callable[..., Any], Any, Any, PackedBatch]:
    """The step with the optimizer of `train`, and the shapes of what it changes and reads: pairs, the optimizer's state, and
    packs in which every token is a target.

    Args:
      params: the parameters of the model, or their shapes.
      model: its configuration.
      config: what the adapter is.
      length: tokens of a pack.
      packs: of a step.

    Raises:
      UnsupportedModelError, ValueError, ImportError: as `init` and `train`.
    """
    adapter = jax.eval_shape(lambda: init_for(params, model, config, jax.random.key(0)))
    optimizer = adam(1e-4, None, 1.0, 100)
    sizes = PackedBatch(tokens=length, starts=_SEQUENCES + 1, rows=length, targets=length)
    batch = PackedBatch(*(jax.ShapeDtypeStruct((packs, size), jnp.int32) for size in sizes))
    return step_of(adapter, optimizer), adapter.pairs, jax.eval_shape(optimizer.init, adapter.pairs), batch
