"""Reads the blocks of a GGUF file and detects damaged scales: infinity or NaN would spread into every result.

The idea: the scales of a run of blocks are checked right after the run was read, while it is still in the processor's cache.
That costs a tenth of the reading time.
"""

from __future__ import annotations

import numpy as np

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights import ggml_types
from ferrum_jax.weights.source import ModelSource

_RUN = 1 << 20  # bytes
_EXPONENT = 0x7C  # these bits of a half's upper byte are all ones in infinity and NaN


def read_blocks(source: ModelSource, info: TensorInfo, out: np.ndarray) -> None:
    """Fills the contiguous uint8 array `out` with a whole tensor. ModelFileError for a scale that is not finite."""
    places = ggml_types.HALVES.get(info.format)
    if places is None:
        source.read_into(info, out)
        return
    size = ggml_types.BY_NAME[info.format].block_bytes
    step = _RUN // size * size
    for begin in range(0, out.nbytes, step):
        part = out[begin : begin + step]
        source.read_into(info, part, begin)
        for place in places:
            exponents = part[place + 1 :: size] & _EXPONENT
            if exponents.max() == _EXPONENT:
                block = begin // size + int(exponents.argmax())
                raise ModelFileError(
                    f"{info.path}: tensor {info.name!r}: block {block} ({info.format}) has a scale that is not finite; the "
                    "file is damaged: download it again"
                )
