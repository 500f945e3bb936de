"""Quantizing: blocks that gguf-py reads, errors compared with those of llama.cpp's own quantizers, and what is refused."""

import json

import gguf
import numpy as np
import pytest

from pallas_kernels.blocks import FORMATS, unpack
from pallas_kernels.blocks.quantize import QUANTIZED, quantize
from support import GOLDENS
from support.quantize_cases import COLUMNS, cases, squared_error

GOLDEN = json.loads((GOLDENS / "quantize" / "errors.json").read_text())
CASES = dict(cases())
WORSE = 1.05  # of the root mean square


def test_the_goldens_are_of_these_weights():
    assert set(GOLDEN["errors"]) == set(QUANTIZED)
    for name, values in CASES.items():
        assert squared_error(values, np.zeros_like(values)) == pytest.approx(GOLDEN["squares"][name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("format", QUANTIZED)
def test_error_is_no_more_than_llama_cpps(format: str):
    blocks = quantize(np.stack(list(CASES.values())), format)
    assert blocks.shape == (len(CASES), len(next(iter(CASES.values()))), FORMATS[format].row_bytes(COLUMNS))
    weights = gguf.quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType[format])
    ours = np.asarray(unpack(blocks, format))
    assert np.array_equal(ours.reshape(weights.shape).view(np.uint32), weights.view(np.uint32))
    for (name, values), made in zip(CASES.items(), ours, strict=True):
        assert squared_error(values, made) <= WORSE**2 * GOLDEN["errors"][format][name], name


@pytest.mark.parametrize(
    "format", [format if format in ("Q8_0", "Q4_K") else pytest.param(format, marks=pytest.mark.slow) for format in QUANTIZED]
)
def test_a_row_does_not_depend_on_its_neighbors(format: str):
    values = np.concatenate([CASES["heavy"], CASES["sparse"]])
    together = quantize(values, format)
    for row in (0, 50, 95):
        assert np.array_equal(quantize(values[row : row + 1], format)[0], together[row])


def test_chunks_and_threads_leave_no_seam():
    values = np.random.default_rng(3).standard_normal((3, 401, 512)).astype(np.float32)  # four chunks and a part of one
    together = quantize(values, "Q8_0")
    assert np.array_equal(together[2, 400], quantize(values[2, 400], "Q8_0"))
    assert np.sqrt(squared_error(values, np.asarray(unpack(together, "Q8_0"))) / values.size) <= 0.01


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float):
    values = np.ones((4, 256), np.float32)
    values[3, 255] = value
    for format in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"):
        with pytest.raises(ValueError, match="not finite"):
            quantize(values, format)


def test_what_cannot_be_quantized_is_refused():
    values = np.full((1, 256), 1e9, np.float32)
    with pytest.raises(ValueError, match=r"1e\+09 are too large for the half-precision scales of Q8_0"):
        quantize(values, "Q8_0")
    with pytest.raises(ValueError, match=r"'Q8_K' is not a format that weights can be quantized to; these are Q4_0, "):
        quantize(values, "Q8_K")
    with pytest.raises(ValueError, match="Q4_K: a row of 128 weights does not consist of whole blocks of 256"):
        quantize(values[:, :128], "Q4_K")
    with pytest.raises(ValueError, match="takes float32 values, not float64"):
        quantize(values.astype(np.float64), "Q8_0")
