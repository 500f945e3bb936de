#!/usr/bin/env bash
# jax on CPU: maximum, minimum and argmax of float8_e8m0fnu block scales are wrong, and jnp.zeros is NaN.
#
# Expected: of [2, 4, 0.5] the maximum is 4 at index 1, as numpy with ml_dtypes says; jnp.zeros is the byte 0,
# 2**-127, as np.zeros is.
# Seen, without an error: jnp.max and jnp.min are NaN, argmax is 0 wherever the maximum is, and jnp.zeros is
# NaN; sort and the maximum of two arrays are right. Asking for the largest scale of a block-scaled (MX)
# weight, or filling a buffer of scales with zeros, makes every weight computed with the result NaN.
# Cause: a reduction starts from a value of its type, minus or plus infinity, and zeros from 0; e8m0 has no
# infinity, sign or zero, so the start itself becomes NaN, and max and min keep a NaN.
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
SCALE = jnp.float8_e8m0fnu
scales = np.array([2.0, 4.0, 0.5], SCALE)
calls = {
    "max": lambda module, x: module.max(x),
    "min": lambda module, x: module.min(x),
    "sort": lambda module, x: module.sort(x),
    "argmax": lambda module, x: module.argmax(x),
    "zeros": lambda module, x: module.zeros(2, SCALE),
}
seen = {}
for name, call in calls.items():
    ours, theirs = (np.asarray(call(module, scales), np.float32).tolist() for module in (jnp, np))
    seen[name] = repr(ours), repr(ours) == repr(theirs)
    print(f"{name} of {scales.tolist()}: jax {ours}, numpy with ml_dtypes {theirs}")
print("expected: what numpy gives")
as_described = seen == {
    "max": ("nan", False),
    "min": ("nan", False),
    "argmax": ("0.0", False),
    "sort": ("[0.5, 2.0, 4.0]", True),
    "zeros": ("[nan, nan]", False),
}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
