#!/usr/bin/env bash
# safetensors: its jax and numpy functions write bfloat16 and float8 that they cannot read back.
#
# Expected: load(save(x)) and load_file after save_file return x, as they do in safetensors.torch.
# Seen: safetensors.flax.save writes bfloat16 and load of the same bytes raises KeyError 'BF16'; load_file
# of bfloat16 works. float8 (e4m3, e5m2, e8m0 block scales) is written by both and read by neither:
# KeyError from bytes, AttributeError (module 'numpy' has no attribute 'float8_e4m3fn') from a file. The
# files are right. So a checkpoint of a quantized model in jax is found unreadable on the day it is needed.
# Cause: the writer takes any dtype by its name; the reader from bytes has a table of numpy's own dtypes, and
# the reader from a file asks the module numpy for everything but bfloat16, which alone is taken from
# ml_dtypes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q safetensors==0.8.0 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu "$work/env/bin/python" - "$work" <<'EOF'
import sys
from collections.abc import Callable

import jax.numpy as jnp
import safetensors
import safetensors.flax

print("safetensors", safetensors.__version__)
path = f"{sys.argv[1]}/x.safetensors"


def outcome(load: Callable) -> str:
    try:
        return str(load()["x"].dtype)
    except (KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


seen = {}
for dtype in ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    tensors = {"x": jnp.arange(1, 5).astype(dtype)}
    data = safetensors.flax.save(tensors)
    safetensors.flax.save_file(tensors, path)
    seen[dtype] = outcome(lambda: safetensors.flax.load(data)), outcome(lambda: safetensors.flax.load_file(path))
    print(f"{dtype}: load {seen[dtype][0]!r}, load_file {seen[dtype][1]!r}")
print("expected: the dtype itself each time")
as_described = (
    seen["float32"] == ("float32", "float32")
    and seen["bfloat16"] == ("KeyError: 'BF16'", "bfloat16")
    and all(a.startswith("KeyError") and b.startswith("AttributeError") for d, (a, b) in seen.items() if "8" in d)
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
