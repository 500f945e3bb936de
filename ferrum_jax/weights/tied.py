"""Whether the output matrix of a checkpoint is its embedding, decided by the stored numbers.

The idea: a tensor is dropped only after it was compared. As in transformers, an output matrix that differs from the embedding
is used, whatever config.json says; one that is equal is kept only once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.quantize import PLAIN, plain_numbers
from ferrum_jax.weights.source import ModelSource

Fill = Callable[[TensorInfo, np.ndarray, int], None]  # as `ModelSource.read_into`
_RUN = 1 << 20  # weights at a time


def same_numbers(first: TensorInfo, fill_first: Fill, second: TensorInfo, fill_second: Fill) -> bool:
    """Whether two tensors have the same shape and numbers. F32, F16 and BF16 are compared by value, other formats by format and
    bytes. Reading ends at the first difference."""
    plain = first.format in PLAIN and second.format in PLAIN
    if first.shape != second.shape or not (plain or first.format == second.format) or first.order or second.order:
        return False
    widths = [PLAIN[info.format].itemsize if plain else 1 for info in (first, second)]
    count = first.nbytes // widths[0]
    for start in range(0, count, _RUN):
        raw = [np.empty(min(_RUN, count - start) * width, np.uint8) for width in widths]
        fill_first(first, raw[0], start * widths[0])
        fill_second(second, raw[1], start * widths[1])
        if first.format == second.format and (raw[0] == raw[1]).all():
            continue
        if not plain:
            return False
        one, other = (
            plain_numbers(part.view(PLAIN[info.format]), info.format) for part, info in zip(raw, (first, second), strict=True)
        )
        if not (one == other).all():
            return False
    return True


def tie(source: ModelSource, tensors: dict[str, TensorInfo]) -> None:
    """Drops the output matrix from the `tensors` of an open checkpoint if it is a copy of the embedding."""
    output, embedding = (tensors.get(name) for name in ("output.weight", "token_embd.weight"))
    if output and embedding and same_numbers(output, source.read_into, embedding, source.read_into):
        del tensors["output.weight"]
