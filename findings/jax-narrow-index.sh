#!/usr/bin/env bash
# jax: a negative int8 or int16 index into a long axis reads and writes another element, without an error.
#
# Expected: index -1 is the last element whatever its integer type, as in numpy.
# Seen: jnp.take, scalar indexing under jit, vmap and scan, and lax.dynamic_update_slice turn int8 -1 on an
# axis of 300 into 43, and int16 -1 (a usual padding id) on a vocabulary of 151,936 into row 20,863.
# take_along_axis is right, and indexing with an array of int8 raises OverflowError even for index 5: the
# same ids go through three ways of treating them.
# Cause: the axis size is added to a negative index in the index's own type, where it wraps around; only the
# path for arrays of indices makes the size a checked constant, and only take_along_axis widens first.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu PYTHONWARNINGS=ignore "$work/env/bin/python" - <<'EOF'
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

print("jax", jax.__version__, "numpy", np.__version__)
short, vocabulary = jnp.arange(300), jnp.arange(151936)
last8, last16 = jnp.array([-1], jnp.int8), jnp.array([-1], jnp.int16)
ways: dict[str, Callable] = {
    "jit(x[i])": lambda x, i: jax.jit(lambda x, i: x[i])(x, i[0]),
    "vmap(x[i])": lambda x, i: jax.vmap(lambda k: x[k])(i)[0],
    "scan over i": lambda x, i: lax.scan(lambda carry, k: (carry, x[k]), 0, i)[1][0],
    "take": lambda x, i: jnp.take(x, i)[0],
    "dynamic_update_slice": lambda x, i: jnp.argmin(lax.dynamic_update_slice(x, jnp.array([-9]), (i[0],))),
    "take_along_axis": lambda x, i: jnp.take_along_axis(x, i, 0)[0],
}
seen = {name: (int(way(short, last8)), int(way(vocabulary, last16))) for name, way in ways.items()}
for name, places in seen.items():
    print(f"{name}: int8 -1 of 300 is element {places[0]}, int16 -1 of 151936 is element {places[1]}")
try:
    by_array = f"element {short[jnp.array([5], jnp.int8)]}"
except OverflowError as error:
    by_array = f"OverflowError: {error}"
print(f"x[i] with an array: int8 5 of 300 is {by_array}")
print("expected: 299 and 151935 each time, and 5")
as_described = all(places == (43, 20863) for name, places in seen.items() if name != "take_along_axis")
as_described = as_described and seen["take_along_axis"] == (299, 151935) and by_array.startswith("OverflowError")
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
