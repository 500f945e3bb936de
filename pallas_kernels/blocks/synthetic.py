"""Random valid blocks of every format, for models that exist only to be measured or tested.

All bytes are random; then the scale fields are overwritten so that the weights are finite, have about the requested standard
deviation and a mean of zero: the sign of a block's scale stays random, and formats with an offset get the one that centers
them. Needs only NumPy and makes about a gigabyte per second.
"""

from __future__ import annotations

import numpy as np

from . import GROUPS, format_of

# Root mean square of the weights for a scale of 1 and random bytes elsewhere (including the centering offset), and the position
# of the half-precision scale.
_HALF_SCALE = {
    "Q4_0": (4.64, 0),
    "Q4_1": (4.61, 0),
    "Q5_0": (9.24, 0),
    "Q5_1": (9.23, 0),
    "Q8_0": (73.9, 0),
    "Q2_K": (13.9, 80),
    "Q3_K": (43.3, 108),
    "Q4_K": (258.0, 0),
    "Q5_K": (527.0, 0),
    "Q6_K": (1366.0, 208),
    "IQ4_NL": (67.4, 0),
    "IQ4_XS": (1247.0, 0),
    "IQ2_XXS": (53.3, 0),
    "IQ2_XS": (55.9, 0),
    "IQ2_S": (56.3, 0),
    "IQ3_XXS": (142.0, 0),
    "IQ3_S": (140.0, 0),
    "IQ1_S": (7.22, 0),
    "TQ1_0": (0.817, 52),
    "TQ2_0": (1.22, 64),
}
_IQ1_M_RMS = 7.20
_FP4_RMS = 5.85
# The offset that centers the weights, in units of the scale, and its position.
_OFFSET = {"Q4_1": (-7.5, 2), "Q5_1": (-15.5, 2), "Q2_K": (1.5, 82), "Q4_K": (7.5, 2), "Q5_K": (15.5, 2)}

_E8M0 = np.ldexp(1.0, np.arange(255) - 128)  # half of the scale that the byte means, as used by the weights
_UE4M3 = np.array([m * 2.0**-10 if e == 0 else (8 + m) * 2.0 ** (e - 11) for e in range(16) for m in range(8)])[:127]
_FP4_SCALES = {"MXFP4": (_E8M0, 1), "NVFP4": (_UE4M3, 4)}


def random_blocks(format: str, rows: int, weights: int, rng: np.random.Generator, std: float) -> np.ndarray:
    """`rows` rows of `weights` random weights: uint8 [rows, row_bytes], to be unpacked as `format`.

    std: their standard deviation, within a factor of 2 (coarser where a format's scale cannot be that small). ValueError:
    unknown format, or a width that does not fill whole blocks.
    """
    known = format_of(format)
    shape = (rows, known.row_bytes(weights))
    if known.block_size == 1:
        return _plain(format, rng, rows * weights, std).view(np.uint8).reshape(shape)
    blocks = _random_bytes(rng, rows * shape[1]).reshape(-1, known.block_bytes)
    if format in GROUPS:
        _put_group(blocks, format, std)
    elif format in _HALF_SCALE:
        unit, at = _HALF_SCALE[format]
        sign = blocks[:, at + 1] & 0x80
        _put_half(blocks, at, std / unit, sign)
        if format in _OFFSET:
            factor, at = _OFFSET[format]
            _put_half(blocks, at, factor * std / unit, sign)
    elif format == "IQ1_M":  # the scale is spread over the top nibbles of four 16-bit words
        bits = int(np.float16(std / _IQ1_M_RMS).view(np.uint16))
        for word, at in enumerate((49, 51, 53, 55)):
            blocks[:, at] = (blocks[:, at] & 0x0F) | ((bits >> (4 * word) & 15) << 4)
    else:
        scales, count = _FP4_SCALES[format]
        blocks[:, :count] = _between(scales, std / _FP4_RMS)[blocks[:, :count]]
    return blocks.reshape(shape)


def _random_bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    words = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64)
    return words.view(np.uint8)[:count]


def _put_half(blocks: np.ndarray, at: int, value: float, sign: np.ndarray) -> None:
    """Write |value| as half precision at byte `at` of every block, with its sign flipped if `sign` is 0x80."""
    low, high = np.array([value], "<f2").view(np.uint8)
    blocks[:, at] = low
    blocks[:, at + 1] = high ^ sign


def _put_group(blocks: np.ndarray, format: str, std: float) -> None:
    """The scale of groups whose codes and zero points are random; zero points stay in their valid range."""
    bits, scale = int(format[1]), format.rpartition("_")[2]
    value = np.array([std / np.sqrt((4**bits - 1) / 6)], np.float32)
    stored = value.astype(np.float16) if scale == "F16" else value
    parts = stored.view(np.uint8)[2 if scale == "BF16" else 0 :]
    blocks[:, : parts.size] = parts
    if bits == 4:
        blocks[:, parts.size] &= 15
    else:
        blocks[:, parts.size + 1] = 0


def _plain(format: str, rng: np.random.Generator, count: int, std: float) -> np.ndarray:
    """Uniform over 256 levels, looked up by random bytes, which is faster than arithmetic on the numbers."""
    levels = ((np.arange(256) - 127.5) * (std * np.sqrt(12) / 256)).astype(np.float32)
    table = {
        "F32": levels,
        "F16": levels.astype(np.float16).view(np.uint16),
        "BF16": (levels.view(np.uint32) >> 16).astype(np.uint16),
    }[format]
    return table[_random_bytes(rng, count)]


def _between(scales: np.ndarray, value: float) -> np.ndarray:
    """A table of 256 codes of the two scales around `value`, mixed so that a random byte has the right mean square."""
    lower = int(np.clip(np.searchsorted(scales, value, side="right") - 1, 0, len(scales) - 2))
    below, above = scales[lower] ** 2, scales[lower + 1] ** 2
    share = np.clip((value**2 - below) / (above - below), 0, 1)
    return (lower + (np.arange(256) < round(256 * share))).astype(np.uint8)
