"""8-bit elements as 16-bit operands: all patterns, in jnp and in PTX, which a small machine of its eight instructions runs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.paged_attention import elements

BYTES = np.arange(256, dtype=np.uint8)


def machine(body: str, words: np.ndarray, dtype: str) -> np.ndarray:
    """Runs PTX on pairs of uint16 words: uint32 in, uint32 out, as `dtype` [pairs, 2]."""
    registers = {"$1": words.astype(np.uint16).reshape(-1, 2).view(np.uint32)[:, 0]}
    packed = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}

    def value(operand):
        if operand in registers:
            return registers[operand]
        return np.full_like(registers["$1"], int(operand, 0))

    def halves(bits, kind):
        return bits.view(packed[kind]).astype(np.float32)

    for instruction in body.strip("{ }").split(";"):
        name, _, operands = instruction.strip().partition(" ")
        target, *sources = (part.strip() for part in operands.split(","))
        match name.split("."):
            case ["", "reg", *_] | [""]:
                continue
            case ["mov", "b32"]:
                result = value(sources[0])
            case ["and", "b32"]:
                result = value(sources[0]) & value(sources[1])
            case ["add", "u32"]:
                result = value(sources[0]) + value(sources[1])
            case ["shl", "b32"]:
                result = value(sources[0]) << int(sources[1])
            case ["shr", "u32"]:
                result = value(sources[0]) >> int(sources[1])
            case ["lop3", "b32"]:
                a, b, c = (value(source) for source in sources[:3])
                result = {0x6A: (a & b) ^ c, 0xEA: (a & b) | c}[int(sources[3], 0)]
            case ["sub", "rn", kind]:
                a, b = (halves(value(source), kind) for source in sources)
                result = (a - b).astype(packed[kind]).view(np.uint32)
            case ["fma", "rn", kind]:
                a, b, c = (halves(value(source), kind) for source in sources)
                result = (a * b + c).astype(packed[kind]).view(np.uint32)
            case _:
                raise AssertionError(f"the machine has no {name}")
        registers[target] = result
    return registers["$0"].view(jnp.dtype(dtype)).reshape(words.shape)


@pytest.fixture(params=["jnp", "ptx"])
def interpret(request, monkeypatch):
    def asm(body, *, args, constraints, pack, result):
        assert (constraints, pack) == ("=r,r", 2)
        return jnp.asarray(machine(body, np.asarray(args[0]), result.dtype.name))

    monkeypatch.setattr(compat, "triton_asm", asm)
    return request.param == "jnp"


def words(other: int) -> jnp.ndarray:
    """Every pattern in the low byte with `other` in the high one, and the reverse, in both places of a register."""
    low = BYTES.astype(np.uint16) | np.uint16(other << 8)
    high = BYTES.astype(np.uint16) << 8 | np.uint16(other)
    return jnp.asarray(np.stack([low, high[::-1], high, low[::-1]], axis=1))


@pytest.mark.parametrize("other", [0, 0x55, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int8(interpret, dtype, other):
    halves = elements.from_int8(words(other), dtype, interpret)
    expected = np.asarray(words(other)).view(np.int8).reshape(256, 4, 2)
    for half, values in enumerate(halves):
        assert values.dtype == dtype
        assert (np.asarray(values, np.float32) == expected[..., half]).all()


@pytest.mark.parametrize("other", [0, 0x55, 0x7F, 0x80, 0xFF])
def test_e4m3(interpret, other):
    halves = elements.from_e4m3(words(other), interpret)
    expected = np.asarray(words(other)).view(ml_dtypes.float8_e4m3fn).reshape(256, 4, 2).astype(np.float32)
    for half, values in enumerate(halves):
        assert values.dtype == jnp.float16
        assert np.array_equal(np.asarray(values, np.float32) * elements.E4M3_UNIT, expected[..., half], equal_nan=True)
        signs = np.signbit(np.asarray(values, np.float32)) == np.signbit(expected[..., half])
        assert signs.all()


def test_both_forms_agree_on_all_words():
    """65,536 words at once, without the fixture's stand-in: the jnp form against ml_dtypes."""
    every = jnp.arange(65536, dtype=jnp.uint16)
    pairs = np.asarray(every).view(np.uint8).reshape(-1, 2)
    e4m3 = jax.jit(lambda w: elements.from_e4m3(w, True))(every)
    for half in range(2):
        expected = pairs[:, half].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert np.array_equal(np.asarray(e4m3[half], np.float32) * elements.E4M3_UNIT, expected, equal_nan=True)
