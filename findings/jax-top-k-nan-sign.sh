#!/usr/bin/env bash
# jax on CPU: lax.top_k puts a NaN first or last depending on its sign bit, and computed NaNs have it set.
#
# Expected: lax.top_k treats every NaN alike, as jnp.argmax, jnp.sort and jnp.max do (and torch.topk).
# Seen: the constant nan comes out first, while the NaN of 0/0 or inf-inf, which x86 makes with the sign
# bit set, sorts below -inf. So a sampler whose logits hold NaNs picks a finite token and goes on, and a
# test that plants jnp.nan sees the other behavior.
# Cause: top_k compares floats by their bits as signed integers (a total order with -NaN below -inf), and
# does not first replace NaNs by one canonical NaN as lax.sort does.
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

print("jax", jax.__version__)
computed = np.asarray(jax.jit(lambda a: a / a)(np.zeros(1, np.float32)))[0]
seen = {}
for name, nan in {"constant": np.float32(np.nan), "0/0": computed}.items():
    logits = np.array([1.0, nan, 2.0, -np.inf], np.float32)
    order = jax.lax.top_k(logits, 4)[1].tolist()
    seen[name] = (bool(np.signbit(nan)), order, int(jnp.argmax(logits)), jnp.argsort(logits).tolist())
    print(f"NaN from {name}: sign bit {seen[name][0]}, top_k {order}, argmax {seen[name][2]}, argsort {seen[name][3]}")
print("expected: the same order for both, index 1 (the NaN) at the same end")
fused = jax.jit(lambda a: jax.lax.top_k(a / a, 1)[0])(np.array([0.0, 1.0], np.float32))
print("top_k(a / a, 1) of [0, 1] in one program:", fused)
as_described = seen == {
    "constant": (False, [1, 2, 0, 3], 1, [3, 0, 2, 1]),
    "0/0": (True, [2, 0, 3, 1], 1, [3, 0, 2, 1]),
} and float(fused[0]) == 1.0
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
