"""The block formats: what the bytes of a compressed matrix mean, and their exact unpacking in jnp.

One file per family of formats describes their layout and decodes them. `FORMATS` is the table of ggml's formats, `GROUPS` of
those that other checkpoints are repacked into; `format_of` finds either. Unpacking is bit-exact (see format.py) and plain
elementwise jnp, so it fuses into the jitted step that calls it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .format import BlockFormat, half_to_float32, split
from .fp4 import MXFP4, NVFP4
from .groups import GROUPS
from .iq1 import IQ1_M, IQ1_S
from .iq2 import IQ2_S, IQ2_XS, IQ2_XXS
from .iq3 import IQ3_S, IQ3_XXS
from .iq4 import IQ4_NL, IQ4_XS
from .plain import BF16, F16, F32
from .q2_k import Q2_K
from .q3_k import Q3_K
from .q4 import Q4_0, Q4_1
from .q4_k import Q4_K
from .q5 import Q5_0, Q5_1
from .q5_k import Q5_K
from .q6_k import Q6_K
from .q8 import Q8_0
from .tq import TQ1_0, TQ2_0

__all__ = ["BY_TYPE_ID", "FORMATS", "GROUPS", "BlockFormat", "format_of", "half_to_float32", "unpack"]

# fmt: off
_ALL = (
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M, TQ1_0, TQ2_0, MXFP4, NVFP4,
)
# fmt: on
FORMATS: dict[str, BlockFormat] = {known.name: known for known in _ALL}
BY_TYPE_ID: dict[int, BlockFormat] = {known.type_id: known for known in _ALL}


def format_of(name: str) -> BlockFormat:
    """The format of that name, a key of `FORMATS` or of `GROUPS`; ValueError if there is none."""
    known = FORMATS.get(name) or GROUPS.get(name)
    if known is None:
        raise ValueError(f"unknown block format {name!r}; known are {', '.join((*FORMATS, *GROUPS))}")
    return known


@partial(jax.jit, static_argnames="name", inline=True)
def _unpack(raw: jax.Array, name: str) -> jax.Array:
    known = format_of(name)
    width = known.storage.itemsize
    if width > 1:
        raw = lax.bitcast_convert_type(split(raw, width), known.storage)
    return known.decode(raw)


def unpack(raw: jax.Array | np.ndarray, format: str) -> jax.Array:
    """The weights of compressed rows, exactly as ggml defines them.

    raw: uint8 [..., bytes], whole blocks in file order, for every format (F32, F16 and BF16 too: little-endian). format: a key
    of `FORMATS` (ggml's name) or of `GROUPS`. Returns float32 [..., weights]. May be traced. ValueError: unknown format,
    another dtype, or bytes that do not fill whole blocks.
    """
    known = format_of(format)
    if raw.dtype != jnp.uint8:
        raise ValueError(f"{format}: unpack takes the bytes of the blocks as uint8, not {raw.dtype}")
    if raw.ndim == 0 or raw.shape[-1] % known.block_bytes:
        raise ValueError(
            f"{format}: an array of shape {raw.shape} does not consist of whole blocks; "
            f"its last axis must be a multiple of {known.block_bytes} bytes"
        )
    return _unpack(raw, format)
