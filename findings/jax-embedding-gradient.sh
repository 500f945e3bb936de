#!/usr/bin/env bash
# jax on CPU: the gradient of a bfloat16 embedding lookup stops growing at 256 occurrences of a token.
#
# Expected: the gradient of a row is the sum over the token's places, rounded once, as jnp.sum and a product
# with a one-hot matrix give for bfloat16.
# Seen: 1,000 places with gradient 1 give 256, 4,000 places give 256, in bfloat16, and 2,048 in float16; also
# where the table is float32 and cast before the lookup, as mixed precision does. Frequent tokens (padding, a
# space, the start token) get a fraction of their gradient, and jax.ops.segment_sum of bfloat16 is the same.
# Cause: the gradient of a gather is a scatter-add, which adds one at a time in the dtype of the operand
# (256 + 1 is 256 in bfloat16), while reductions and products accumulate in float32.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'EOF'
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

print("jax", jax.__version__)


def gradient(places: int, dtype: type, lookup: Callable) -> float:
    """Of the sum of looked-up rows by the row of token 0, which is at every place; the table is float32."""
    ids = jnp.zeros(places, jnp.int32)
    loss = lambda table: lookup(table.astype(dtype), ids).astype(jnp.float32).sum()  # noqa: E731
    return float(jax.jit(jax.grad(loss))(jnp.zeros((4, 8)))[0, 0])


lookups = {
    "table[ids]": lambda table, ids: table[ids],
    "one_hot @ table": lambda table, ids: jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table,
}
seen = {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    for name, lookup in lookups.items():
        seen[dtype.__name__, name] = [gradient(places, dtype, lookup) for places in (100, 1000, 4000)]
        print(f"{dtype.__name__}, {name}: 100, 1000, 4000 places give {seen[dtype.__name__, name]}")
print("expected: 100, 1000 and 4000 within the precision of the type")
as_described = (
    seen["float16", "table[ids]"] == [100, 1000, 2048]
    and seen["bfloat16", "table[ids]"] == [100, 256, 256]
    and all(values[1] == 1000 and abs(values[2] - 4000) <= 16 for key, values in seen.items() if "one_hot" in key[1])
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
