"""Writes tests/goldens/quantize/errors.json: the squared error of llama.cpp's own quantizers, without an importance
matrix, on the weights of tests/support/quantize_cases.py.

    LLAMA_BINS=<folder with libggml-base.so of llama.cpp> PYTHONPATH=tests python tests/goldens/scripts/make_quantize_goldens.py

Its blocks are unpacked by gguf-py, whose answer is exact. The sum of squares of the weights ties the numbers to the cases.
"""

import ctypes
import json
import os
from pathlib import Path

import gguf
import numpy as np

from support import GOLDENS
from support.quantize_cases import cases, squared_error

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def quantize(base: ctypes.CDLL, values: np.ndarray, name: str) -> np.ndarray:
    """llama.cpp's blocks: uint8 [rows, bytes]."""
    kind = gguf.GGMLQuantizationType[name]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    out = np.zeros((rows, columns // size * width), np.uint8)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, out)]
    sizes = [ctypes.c_int64(size) for size in (0, rows, columns)]
    written = base.ggml_quantize_chunk(int(kind), *pointers, *sizes, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out


def main() -> None:
    base = ctypes.CDLL(str(Path(os.environ["LLAMA_BINS"]) / "libggml-base.so"))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    golden: dict[str, dict] = {"squares": {}, "errors": {}}
    for case, values in cases():
        golden["squares"][case] = squared_error(values, np.zeros_like(values))
        for name in FORMATS:
            blocks = quantize(base, values, name)
            weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
            golden["errors"].setdefault(name, {})[case] = squared_error(values, weights)
    path = GOLDENS / "quantize" / "errors.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
