"""LoRA adapters next to a model's weights: several at once, and each row uses one of them or none.

The A of all adapters are stacked vertically and their B horizontally, padded with zeros to the same rank. So a projection gains
two small products for all tokens together: x A^T [tokens, adapters * rank], in which each token keeps only the columns of its
own adapter, times B^T. They are float32 for weights of any format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_jax.distributed import Placement
from ferrum_jax.quantized import LayerStack, QuantizedTensor

A, B = "_lora_a", "_lora_b"  # suffixes of the matrix's name
COLUMNS = "adapter_columns"
Factors = Mapping[tuple[int, tuple[str, ...]], tuple[np.ndarray, np.ndarray]]
"""By layer and parameter path: A float32 [rank, in] and B float32 [out, rank], which add x A^T B^T to a projection of x; or for
each of several matrices that make up a parameter, [matrices, rank, in] and [matrices, out, rank]."""


def with_adapters(params: Mapping[str, Any], adapters: Sequence[Factors], num_layers: int, placement: Placement) -> dict:
    """Adds adapters to the parameters. Their indices are those in the list. `params[COLUMNS]`, int32 [adapters * rank], has the
    index of the adapter that each column belongs to."""
    rank = max(a.shape[-2] for factors in adapters for a, _ in factors.values())
    width = len(adapters) * rank
    layers: dict[str, Any] = dict(params["layers"])
    for path in sorted({path for factors in adapters for _, path in factors}):
        found = {
            number: {i: f[number, path] for i, f in enumerate(adapters) if (number, path) in f} for number in range(num_layers)
        }
        shapes = [next(((*b.shape[:-1], a.shape[-1]) for a, b in pairs.values()), None) for pairs in found.values()]
        kinds = tuple(f"F32 {list(shape)}" if shape else "" for shape in shapes)  # layers of one shape share a stack
        stacks: dict[str, dict[str, QuantizedTensor]] = {A: {}, B: {}}
        for kind, shape in dict(zip(kinds, shapes, strict=True)).items():
            if shape is None:
                continue
            members = [pairs for pairs, own in zip(found.values(), kinds, strict=True) if own == kind]
            stacked_a = np.zeros((len(members), *shape[:-2], width, shape[-1]), np.float32)
            stacked_b = np.zeros((len(members), *shape[:-1], width), np.float32)
            for layer, pairs in enumerate(members):
                for i, (a, b) in pairs.items():
                    columns = slice(i * rank, i * rank + a.shape[-2])
                    stacked_a[layer, ..., columns, :], stacked_b[layer, ..., columns] = a, b
            for suffix, stacked in ((A, stacked_a), (B, stacked_b)):
                stacks[suffix][kind] = QuantizedTensor.of(placement.put(stacked), "F32")
        node = layers
        for group in path[:-1]:
            node[group] = dict(node[group])
            node = node[group]
        node |= {path[-1] + suffix: LayerStack(stacks[suffix], kinds) for suffix in (A, B)}
    return dict(params) | {"layers": layers, COLUMNS: placement.put(np.arange(width, dtype=np.int32) // rank)}


def nbytes(adapters: Sequence[Factors]) -> int:
    """The bytes that `with_adapters` adds to the parameters."""
    rank = max((a.shape[-2] for factors in adapters for a, _ in factors.values()), default=0)
    sizes = {key: (a.size + b.size) // a.shape[-2] for factors in adapters for key, (a, b) in factors.items()}
    return 4 * len(adapters) * rank * (sum(sizes.values()) + 1)


def without_adapters(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of layers without those of adapters."""
    return {
        name: without_adapters(member) if isinstance(member, Mapping) else member
        for name, member in layers.items()
        if not name.endswith((A, B))
    }
