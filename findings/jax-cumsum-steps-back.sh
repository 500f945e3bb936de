#!/usr/bin/env bash
# jax on CPU: jnp.cumsum of probabilities is not monotone at vocabulary size.
#
# Expected: a running sum of values >= 0 never falls, as numpy's float32 cumsum of the same array.
# Seen: for softmax outputs over 20,000 to 256,000 tokens it steps back by one unit in the last place, at
# more places the longer the array is (over 50 for 151,936 tokens), sorted or not. A nucleus
# taken as `cumsum < p` then need not be a prefix, and searchsorted (inverse sampling from the cumulative
# sum) runs on an array that is not sorted.
# Cause: on CPU cumsum becomes a blocked reduction: each element is the prefix of its block plus the sum of
# the blocks before it, two roundings that the neighbor in the next block does not share.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
falls = {}
for tokens in (1000, 32000, 151936):
    logits = 2 * np.random.default_rng(0).standard_normal(tokens, dtype=np.float32)
    probabilities = np.sort(np.asarray(jax.nn.softmax(logits)))[::-1].copy()
    ours = np.asarray(jnp.cumsum(probabilities))
    falls[tokens] = (int((np.diff(ours) < 0).sum()), int((np.diff(np.cumsum(probabilities)) < 0).sum()))
    print(f"{tokens} sorted probabilities: jnp.cumsum falls {falls[tokens][0]} times, numpy's {falls[tokens][1]}")
    if falls[tokens][0]:
        at = int(np.argmax(np.diff(ours) < 0))
        print(f"  first at {at}: {ours[at]:.9f} then {ours[at + 1]:.9f}, adding {probabilities[at + 1]:.2e}")
print("expected: 0 everywhere")
as_described = falls[1000][0] == 0 and falls[151936][0] > 10 and not any(n for _, n in falls.values())
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
