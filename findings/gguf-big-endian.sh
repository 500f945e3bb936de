#!/usr/bin/env bash
# gguf: its writer, its converter and its reader disagree about big-endian files.
#
# Expected: a model written with GGUFWriter(endianess=BIG) has the bytes of the little-endian file after
# `gguf-convert-endian FILE big`, and GGUFReader with gguf.quants.dequantize gives the weights of both.
# Seen: float32 and float16 tensors of either file dequantize to garbage (values up to 1e38, some NaN), no
# error. The writer leaves the float16 block scales of Q8_0 and Q4_0 and all of BF16 in little-endian
# order, the converter turns them around, so one big-endian file is right for llama.cpp on such a machine
# and the other is not, and of the two dequantize reads the wrong one.
# Cause: the writer swaps by numpy item, and raw blocks are bytes; dequantize views the bytes of what the
# reader gives it as native float32 or float16, which drops the byte order in the array's dtype.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q gguf==0.19.0 numpy==2.4.6
PYTHONWARNINGS=ignore "$work/env/bin/python" - "$work" <<'EOF'
import shutil
import subprocess
import sys
from importlib.metadata import version

import gguf
import numpy as np

print("gguf", version("gguf"), "on a", sys.byteorder, "endian machine")
work = sys.argv[1]
weights = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
TYPES = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")]


def write(path: str, order: gguf.GGUFEndian) -> None:
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for kind in TYPES:
        writer.add_tensor(kind.name, gguf.quants.quantize(weights, kind).copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def right(path: str) -> dict[str, bool]:
    """Which types dequantize to the weights, within their precision."""
    tensors = gguf.GGUFReader(path).tensors
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in tensors}
    return {name: bool(np.abs(value - weights).max() < 1) for name, value in values.items()}


write(f"{work}/little.gguf", gguf.GGUFEndian.LITTLE)
write(f"{work}/written.gguf", gguf.GGUFEndian.BIG)
shutil.copy(f"{work}/little.gguf", f"{work}/converted.gguf")
convert = [f"{work}/env/bin/gguf-convert-endian", f"{work}/converted.gguf", "big"]
subprocess.run(convert, input="YES\n", text=True, capture_output=True, check=True)

seen = {name: right(f"{work}/{name}.gguf") for name in ("little", "written", "converted")}
for name, types in seen.items():
    print(f"{name}: dequantizes to the weights: {types}")
tensors = [gguf.GGUFReader(f"{work}/{name}.gguf").tensors for name in ("written", "converted")]
same = {a.name: a.data.tobytes() == b.data.tobytes() for a, b in zip(*tensors)}
print("the two big-endian files have equal bytes:", same)
print("expected: True everywhere")
floats = {"F32": False, "F16": False}
raw = dict.fromkeys(("BF16", "Q8_0", "Q4_0"))
as_described = (
    all(seen["little"].values())
    and seen["written"] == {**floats, **dict.fromkeys(raw, True)}
    and not any(seen["converted"].values())
    and same == {"F32": True, "F16": True, **dict.fromkeys(raw, False)}
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
