"""One matrix or two: whether the output of a checkpoint is its embedding, decided by what is stored.

The idea: a tensor is passed over only after it was compared. As transformers does, an output matrix that holds other numbers
than the embedding is the output, whatever config.json says; one that holds the same numbers is stored once.
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
    """Whether two tensors have one shape and hold the same numbers: in F32, F16 or BF16 those that they stand for, in other
    formats the same bytes of the same format. Reading ends at the first difference."""
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
    """Drops the output matrix from the `tensors` of an open checkpoint where it is a copy of the embedding."""
    output, embedding = (tensors.get(name) for name in ("output.weight", "token_embd.weight"))
    if output and embedding and same_numbers(output, source.read_into, embedding, source.read_into):
        del tensors["output.weight"]
