#!/usr/bin/env bash
# jaxlib 0.12 on a CPU: within one array, an exponential that XLA fuses with other operations has two roundings.
#
# Expected: exp(x - max) of equal rows is equal, wherever the rows are in an array, as with jaxlib 0.10.2 and as with exp alone.
# Seen: with jaxlib 0.12.0.1 rows of 3 to 5 numbers, repeated in one array, get two results that differ in the last bits:
# the elements that a vector register takes and those after the last whole register are computed by different code. So
# the same row also differs between a batch of 1 and a batch of 512. sigmoid, silu, gelu, exp2 and softplus do the same.
# Rows whose length is a multiple of the register are equal, as is an exponential between two optimization barriers.
# Python 3.12 for jaxlib 0.12 (${PYTHON312:-python3.12}), 3.11 for 0.10.2. Seen on x86-64 with AVX-512; with
# XLA_FLAGS=--xla_cpu_max_isa=AVX2 the places are others.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/show.py" <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax



def shifted(x):
    return x - jnp.max(x, axis=1, keepdims=True)


FUNCTIONS = {
    "exp alone": jnp.exp,
    "exp(x - max) between barriers": lambda x: lax.optimization_barrier(jnp.exp(lax.optimization_barrier(shifted(x)))),
    "exp(x - max)": lambda x: jnp.exp(shifted(x)),
    "silu": jax.nn.silu,
}
found = {}
for name, function in FUNCTIONS.items():
    differing = 0
    for width in (3, 4, 5):
        x = np.random.default_rng(0).normal(0, 3, (512, width)).astype(np.float32)
        together = np.asarray(jax.jit(function)(x))
        one = jax.jit(function)
        alone = np.concatenate([np.asarray(one(x[i : i + 1])) for i in range(512)])
        differing += int((together != alone).sum())
    found[name] = differing
    print(f"jaxlib {jax.lib.__version__}: {name}: {differing} of 6144 elements differ between a batch of 512 rows and one row")
expected = {"0.10.2": (0, 0, False), "0.12.0.1": (0, 0, True)}[jax.__version__]
alone, barriers, fused, silu = found.values()
as_described = (alone, barriers) == expected[:2] and (fused > 0) == expected[2] and (silu > 0) == expected[2]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
status=0
for pair in "${PYTHON:-python3.11} 0.10.2" "${PYTHON312:-python3.12} 0.12.0.1"; do
  read -r python version <<<"$pair"
  "$python" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$work/$version/bin/python" "$work/show.py" || status=1
done
exit $status
