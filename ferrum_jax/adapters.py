"""LoRA adapters beside a model's weights: several at once, each token with the one of its row or none.

The A of all adapters lie one below the other and their B side by side, padded with zeros to one rank, so a projection
gains two small products for all tokens together: x A^T [tokens, adapters * rank], in which each token keeps the columns of
its own adapter and nothing else, times B^T. They are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ferrum_jax.quantized import LayerStack, QuantizedTensor

A, B = "_lora_a", "_lora_b"  # behind the name of the matrix
COLUMNS = "adapter_columns"
Factors = Mapping[tuple[int, tuple[str, ...]], tuple[np.ndarray, np.ndarray]]
"""By layer and parameter path: A float32 [rank, in] and B float32 [out, rank], which add x A^T B^T to a projection of x."""


def with_adapters(params: Mapping[str, Any], adapters: Sequence[Factors], num_layers: int, device: jax.Device) -> dict:
    """The parameters with some adapters beside them, known by their place in the list. `params[COLUMNS]` int32
    [adapters * rank]: whose each column is."""
    rank = max(len(a) for factors in adapters for a, _ in factors.values())
    width = len(adapters) * rank
    layers: dict[str, Any] = dict(params["layers"])
    for path in sorted({path for factors in adapters for _, path in factors}):
        found = {
            number: {i: f[number, path] for i, f in enumerate(adapters) if (number, path) in f} for number in range(num_layers)
        }
        layout = tuple("F32" if found[number] else "" for number in range(num_layers))
        a, b = next(pair for pairs in found.values() for pair in pairs.values())
        below = np.zeros((num_layers - layout.count(""), width, a.shape[1]), np.float32)
        beside = np.zeros((len(below), b.shape[0], width), np.float32)
        for place, pairs in enumerate(filter(None, found.values())):
            for i, (a, b) in pairs.items():
                columns = slice(i * rank, i * rank + len(a))
                below[place, columns], beside[place, :, columns] = a, b
        group, name = path
        layers[group] = dict(layers[group]) | {
            name + suffix: LayerStack({"F32": QuantizedTensor.of(jax.device_put(stacked, device), "F32")}, layout)
            for suffix, stacked in ((A, below), (B, beside))
        }
    return dict(params) | {"layers": layers, COLUMNS: jax.device_put(np.arange(width, dtype=np.int32) // rank, device)}


def nbytes(adapters: Sequence[Factors]) -> int:
    """What `with_adapters` puts beside the weights."""
    rank = max((len(a) for factors in adapters for a, _ in factors.values()), default=0)
    sizes = {key: a.shape[1] + b.shape[0] for factors in adapters for key, (a, b) in factors.items()}
    return 4 * len(adapters) * rank * (sum(sizes.values()) + 1)


def without_adapters(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers' parameters without those of adapters."""
    return {
        name: without_adapters(member) if isinstance(member, Mapping) else member
        for name, member in layers.items()
        if not name.endswith((A, B))
    }
