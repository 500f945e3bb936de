"""The operations of this package by name, each with its backends in order of preference.

Choices are recorded, and backends forced, under these names.
"""

from __future__ import annotations

from collections.abc import Mapping

from pallas_kernels import append, decoder_layers, delta_net, grouped_matmul, paged_attention, quantized_matmul, routing
from pallas_kernels.dispatch import Backend

OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "decoder_layers": decoder_layers.BACKENDS,
    "quantized_matmul": quantized_matmul.BACKENDS,
    "swiglu": quantized_matmul.SWIGLU_BACKENDS,
    "grouped_matmul": grouped_matmul.BACKENDS,
    "matmul_by_head": grouped_matmul.HEAD_BACKENDS,
    "expert_ffn": grouped_matmul.EXPERT_BACKENDS,
    "route": routing.BACKENDS,
    "append": append.BACKENDS,
    "paged_attention": paged_attention.BACKENDS,
    "delta_net": delta_net.BACKENDS,
}


def forced(implementation: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Backends by operation as the (operation, backend) pairs that operations take; ValueError for an unknown name."""
    for operation, name in implementation.items():
        if operation not in OPERATIONS:
            raise ValueError(f"there is no operation {operation!r}; there are {', '.join(OPERATIONS)}")
        known = [backend.name for backend in OPERATIONS[operation]]
        if name not in known:
            raise ValueError(f"{operation} has no implementation {name!r}; it has {', '.join(known)}")
    return tuple(sorted(implementation.items()))
