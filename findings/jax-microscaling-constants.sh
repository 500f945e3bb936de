#!/usr/bin/env bash
# jax: a convert to float8_e8m0fnu or float4_e2m1fn gives other values for a constant than for an argument.
#
# Expected: jit(f)(x) and jit(lambda: f(x))() are equal: closing over an array changes the speed at most.
# Seen on CPU: a block scale of 0 (a block of zeros) becomes NaN in e8m0 as an argument, and with it the
# block, but 2**-127 as a constant; negatives become NaN or their absolute value; infinity becomes 6 in
# e2m1 as an argument and 0 as a constant; the stored e8m0 byte 255 (NaN) reads as inf from a constant.
# So MX weights that a function closes over dequantize differently from weights that are passed in.
# Cause: converts of constants are folded already in StableHLO (the first HLO dumped holds the folded
# value), by an implementation whose rules for what these types cannot hold differ from the code that
# XLA emits, and from ml_dtypes, which agrees with the latter.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)


def both(values: np.ndarray, dtype: type) -> tuple[list, list]:
    """`values` to `dtype` and back to float32: passed in, and closed over."""

    def there_and_back(x: jax.Array) -> jax.Array:
        return jnp.asarray(x).astype(dtype).astype(jnp.float32)

    return jax.jit(there_and_back)(values).tolist(), jax.jit(lambda: there_and_back(values))().tolist()


cases = {
    "e8m0": (np.array([0.0, -1.5, 3.0], np.float32), jnp.float8_e8m0fnu),
    "e8m0 byte 255": (np.array([255], np.uint8).view(jnp.float8_e8m0fnu), jnp.float8_e8m0fnu),
    "e2m1": (np.array([np.inf, -np.inf, 3.0], np.float32), jnp.float4_e2m1fn),
}
seen = {}
for name, (values, dtype) in cases.items():
    passed, closed = seen[name] = both(values, dtype)
    library = values.astype(dtype).astype(np.float32).tolist()
    print(f"{name} of {values.tolist()}: argument {passed}, constant {closed}, ml_dtypes {library}")
print("expected: argument and constant equal")
nan = float("nan")
as_described = repr(seen) == repr(
    {
        "e8m0": ([nan, nan, 4.0], [2.0**-127, 2.0, 4.0]),
        "e8m0 byte 255": ([nan], [float("inf")]),
        "e2m1": ([6.0, -6.0, 3.0], [0.0, -0.0, 3.0]),
    }
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
