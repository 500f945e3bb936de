"""Block formats: bits equal to gguf-py's dequantization, alone and inside larger programs; errors; synthetic blocks."""

from functools import cache

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from jax import lax

from pallas_kernels.blocks import BY_TYPE_ID, FORMATS, BlockFormat, half_to_float32, unpack
from pallas_kernels.blocks.synthetic import random_blocks

ROWS, TILE, WEIGHTS = 96, 16, 1024
# Positions of the half-precision numbers in a block.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S"), (0,)),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ1_S", "F16"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
# Zeros, subnormals, the smallest normals, one, the largest, infinities, NaN.
EDGES = np.array([0, 1, 2, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00], np.uint16)


def dequantized(raw: np.ndarray, name: str) -> np.ndarray:
    """gguf-py's result, float32."""
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32)


@cache
def sample(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes, a third of the rows with edge cases for scales: uint8 [ROWS, bytes], float32 [ROWS, WEIGHTS]."""
    known = FORMATS[name]
    rng = np.random.default_rng(known.type_id)
    raw = rng.integers(0, 256, (ROWS, known.row_bytes(WEIGHTS)), dtype=np.uint8)
    blocks = raw[: ROWS // 3].reshape(-1, known.block_bytes)
    for at in HALVES.get(name, ()):
        sign = rng.integers(0, 2, len(blocks)).astype(np.uint16) << 15
        blocks[:, at : at + 2] = (rng.choice(EDGES, len(blocks)) | sign).view(np.uint8).reshape(-1, 2)
    return raw, dequantized(raw, name)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.dtype == np.float32 and got.shape == expected.shape
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} weights differ"


def test_formats_are_those_of_gguf():
    handled = {}
    for kind in gguf.GGMLQuantizationType:
        try:
            quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        handled[kind.name] = (int(kind), *gguf.GGML_QUANT_SIZES[kind])
    assert {n: (f.type_id, f.block_size, f.block_bytes) for n, f in FORMATS.items()} == handled
    assert {f.type_id: f for f in FORMATS.values()} == BY_TYPE_ID
    assert all(isinstance(f, BlockFormat) and f.name == n for n, f in FORMATS.items())


@pytest.mark.parametrize("name", FORMATS)
def test_unpack_is_bit_exact(name: str):
    raw, expected = sample(name)
    assert_same_bits(unpack(raw, name), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_decode_is_bit_exact_inside_larger_programs(name: str):
    """Tiles of the stored array unpacked in a loop; their bits summed and their products formed in the same fusion."""
    raw, expected = sample(name)
    known = FORMATS[name]
    factors = np.random.default_rng(7).uniform(0.5, 2, WEIGHTS).astype(np.float32)

    @jax.jit
    def program(stored, factors):
        def body(tile, carry):
            weights, bits, products = carry
            rows = lax.dynamic_slice_in_dim(stored, tile * TILE, TILE)
            decoded = known.decode(rows)
            weights = lax.dynamic_update_slice_in_dim(weights, decoded * np.float32(1), tile * TILE, 0)
            finite = jnp.where(jnp.isnan(decoded), np.float32(0), decoded)
            bits += lax.bitcast_convert_type(finite, jnp.uint32).sum(dtype=jnp.uint32)
            products = lax.dynamic_update_slice_in_dim(products, decoded * factors, tile * TILE, 0)
            return weights, bits, products

        empty = jnp.zeros((ROWS, WEIGHTS), jnp.float32)
        return lax.fori_loop(0, ROWS // TILE, body, (empty, jnp.uint32(0), empty))

    stored = raw.view(known.storage)
    assert stored.shape[-1] == known.stored_width(WEIGHTS)
    weights, bits, products = program(stored, factors)
    assert int(bits) == int(np.nan_to_num(expected, posinf=np.inf, neginf=-np.inf).view(np.uint32).sum(dtype=np.uint32))
    # Arithmetic on subnormal float32 is flushed to zero by XLA; only F32, BF16 and MXFP4 have such weights.
    normal = ~(np.abs(expected) < 2.0**-124) | (expected == 0)
    assert_same_bits(np.asarray(weights)[normal], expected[normal])
    with np.errstate(all="ignore"):
        assert_same_bits(np.asarray(products)[normal], (expected * factors)[normal])


def test_unpack_keeps_leading_axes_and_traces():
    raw, expected = sample("Q4_K")
    stacked = raw.reshape(2, 3, ROWS // 6, -1)
    assert_same_bits(jax.jit(lambda r: unpack(r, "Q4_K"))(stacked), expected.reshape(2, 3, ROWS // 6, -1))
    assert_same_bits(unpack(raw[0], "Q4_K"), expected[0])
    assert unpack(raw[:0], "Q4_K").shape == (0, WEIGHTS)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32])
def test_every_half(dtype: type):
    bits = np.arange(65536, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    assert_same_bits(jax.jit(half_to_float32)(bits.astype(dtype)), expected)


def test_every_scale_of_fp4():
    """All 256 scale bytes with all 16 values; MXFP4's smallest are subnormal float32 and its largest infinite."""
    for name, scales in (("MXFP4", 1), ("NVFP4", 4)):
        raw = np.zeros((256, FORMATS[name].block_bytes), np.uint8)
        raw[:, :scales] = np.arange(256, dtype=np.uint8)[:, None]
        raw[:, scales:] = np.resize(np.arange(16, dtype=np.uint8) * 17, raw.shape[1] - scales)
        assert_same_bits(unpack(raw, name), dequantized(raw, name))


def test_errors():
    with pytest.raises(ValueError, match=r"'Q9_Z'.*Q4_K.*NVFP4"):
        unpack(np.zeros((1, 144), np.uint8), "Q9_Z")
    with pytest.raises(ValueError, match=r"Q4_K.*uint8.*float32"):
        unpack(np.zeros((1, 144), np.float32), "Q4_K")
    with pytest.raises(ValueError, match=r"Q4_K.*\(2, 143\).*144"):
        unpack(np.zeros((2, 143), np.uint8), "Q4_K")
    with pytest.raises(ValueError, match=r"Q4_0.*\(\).*18"):
        unpack(np.uint8(0), "Q4_0")
    with pytest.raises(ValueError, match=r"Q4_K.*300.*256"):
        FORMATS["Q4_K"].row_bytes(300)
    with pytest.raises(ValueError, match=r"Q8_0.*33.*32"):
        random_blocks("Q8_0", 1, 33, np.random.default_rng(0), 0.02)
    with pytest.raises(ValueError, match="Q9_Z"):
        random_blocks("Q9_Z", 1, 32, np.random.default_rng(0), 0.02)
    assert FORMATS["Q6_K"].row_bytes(512) == FORMATS["Q6_K"].stored_width(512) == 420
    assert FORMATS["BF16"].row_bytes(7) == 14 and FORMATS["BF16"].stored_width(7) == 7


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_random_blocks(name: str, std: float):
    raw = random_blocks(name, 64, 2048, np.random.default_rng(5), std)
    assert raw.dtype == np.uint8 and raw.shape == (64, FORMATS[name].row_bytes(2048))
    weights = dequantized(raw, name).astype(np.float64)
    assert np.isfinite(weights).all()
    assert std / 2 <= weights.std() <= std * 2
    assert abs(weights.mean()) <= std / 20
    again = random_blocks(name, 64, 2048, np.random.default_rng(5), std)
    assert (raw == again).all()
