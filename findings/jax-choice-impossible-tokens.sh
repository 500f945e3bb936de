#!/usr/bin/env bash
# jax on CPU: jax.random.choice returns tokens whose probability is exactly 0.
#
# Expected: an entry with p == 0 is never drawn, and jnp.cumsum of values >= 0 never falls, as numpy's does
# in float32.
# Seen: over 256,000 tokens with nine in ten masked to 0, tens of draws in a million are masked tokens;
# the cumulative sum falls at about 1,500 places and rises at as many masked ones. So a grammar mask or top-k
# that sets probabilities to 0 does not hold, a nucleus taken as `cumsum < p` need not be a prefix, and
# searchsorted runs on an array that is not sorted. It shows from about a thousand tokens on.
# Cause: on CPU cumsum becomes blocked sums: an element is the prefix of its block plus the total of the
# blocks before it, rounded apart, so sums that differ by 0 come out different at the edge of a block; choice
# looks a uniform number up in them.
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
DRAWS = 1 << 20
seen = {}
for tokens in (16, 1000, 256000):
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal(tokens, dtype=np.float32)
    logits[generator.random(tokens) < 0.9] = -np.inf
    probabilities = np.asarray(jax.nn.softmax(logits))
    masked = probabilities == 0
    steps = np.diff(np.asarray(jnp.cumsum(probabilities)), prepend=0)
    draw = jax.jit(lambda key, p: jax.random.choice(key, p.size, (DRAWS,), p=p))
    impossible = sum(int(masked[np.asarray(draw(jax.random.key(i), probabilities))].sum()) for i in range(4))
    seen[tokens] = impossible, int((steps < 0).sum()), int((steps[masked] > 0).sum())
    of_numpy = np.diff(np.cumsum(probabilities), prepend=0)
    print(f"{tokens} tokens: {impossible} of {4 * DRAWS} draws have probability 0; cumsum falls at", end=" ")
    print(f"{seen[tokens][1]} places and rises at {seen[tokens][2]} masked ones,", end=" ")
    print(f"numpy's at {int((of_numpy < 0).sum())} and {int((of_numpy[masked] > 0).sum())}")
print("expected: 0 everywhere")
as_described = seen[16] == (0, 0, 0) and all(count > 50 for count in seen[256000])
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
