"""What one device computes of a model on a mesh: the configuration with that device's heads.

Whatever else is cut follows from the arrays (`QuantizedTensor.cut`). Keys and values with fewer heads than there are devices
are held by several: each device caches the one head that its queries have.
"""

from __future__ import annotations

import dataclasses
import functools

from ferrum_jax.config import Attention, ModelConfig
from ferrum_jax.distributed.placement import Placement


def head_axes(placement: Placement) -> tuple[str, ...]:
    """The axes of the mesh that heads are cut over."""
    return tuple(name for name in placement.rules["heads"] if placement.mesh.shape.get(name, 1) > 1)


@functools.lru_cache(64)
def share(config: ModelConfig, placement: Placement) -> ModelConfig:
    """The configuration of what each device computes. The number of experts stays that of the model, because every device
    chooses among all of them."""
    (count,) = placement.parts((head_axes(placement),))
    if count == 1:
        return config

    def of(mixer: Attention) -> Attention:
        heads = mixer.num_heads if mixer.num_heads % count else mixer.num_heads // count
        return dataclasses.replace(mixer, num_heads=heads, num_kv_heads=own_kv_heads(mixer, count))

    layers = [
        dataclasses.replace(spec, mixer=of(spec.mixer)) if isinstance(spec.mixer, Attention) else spec for spec in config.layers
    ]
    return dataclasses.replace(config, layers=tuple(layers))


def own_kv_heads(mixer: Attention, count: int) -> int:
    """How many heads of keys and values one of `count` devices has; all of them if no other number is right."""
    if mixer.num_kv_heads % count == 0:
        return mixer.num_kv_heads // count
    return mixer.num_kv_heads if count % mixer.num_kv_heads else 1
