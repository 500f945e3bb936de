"""Backends that the user forces: named when loading, kept in the configuration, and so part of every program's key.

A step is traced over abstract weights to find out, before any weights are read, whether they can serve the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax import families, functional, memory
from ferrum_jax.distributed import Placement
from ferrum_jax.mapped import mapped
from ferrum_jax.models import bert
from ferrum_jax.runtime import PAGE
from pallas_kernels import dispatch, operations

_TOKENS = (1, 64)  # of a decoding step, and of one that reads a prompt


def checked_implementation(implementation: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """The backends as a configuration stores them. Raises ValueError if they are not a mapping or have an unknown name."""
    if implementation is None:
        return ()
    if not isinstance(implementation, Mapping):
        raise ValueError(
            f"implementation must be backends by operation, as in {{'append': 'xla'}}, not {implementation!r:.200}"
        )
    try:
        return operations.forced(implementation)
    except ValueError as error:
        raise ValueError(f"implementation: {error}") from None


def require_implementation(config: Any, params: Any, kv_dtype: str, placement: Placement) -> None:
    """Raises ValueError if a forced backend cannot serve the model or the model does not use it. config: of any family; params:
    may be abstract."""
    embeds = families.of_architecture(config.architecture, "implementation").embeds
    with placement.as_default(), dispatch.record() as choices:
        for tokens in _TOKENS:
            if embeds:
                embed = functools.partial(bert.embed, config=config, normalize=True)
                jax.eval_shape(embed, params, _ints(1, tokens), _ints(1))
            else:
                pages = -(-tokens // PAGE)
                cache = memory.abstract_state(config, pages, PAGE, kv_dtype, placement)
                each = _ints(tokens)
                batch = functional.RaggedBatch(each, each, each, _ints(2), _ints(1), _ints(1, pages), _ints(1))
                step, _ = mapped(placement, functional.forward, (params, cache, batch), {"config": config})
                jax.eval_shape(step, params, cache, batch)
    used = {choice.operation: choice.backend for choice in choices}
    for operation, _ in config.implementation:
        if operation not in used:
            by = ", ".join(f"{name} ({backend})" for name, backend in used.items())
            raise ValueError(f"implementation: this model does not use {operation}; it uses {by}")


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
