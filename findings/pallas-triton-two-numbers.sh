#!/usr/bin/env bash
# Pallas for NVIDIA GPUs: jnp.where with a scalar condition and two Python numbers chooses between two booleans.
#
# Expected: a kernel that writes jnp.where(x[0] != 0, 32, 1) writes 32 or 1, as in interpret mode, and with 0.5 and
# 2.0 it writes one of these.
# Seen: the module that the Triton lowering makes has boolean constants in their places, of the last bit of an integer (32
# becomes false, 1 true) and false for both floats, and selects between those. The result is stored as 0 or 1, without an
# error or a warning; only where it is added to something, the lowering stops with "AssertionError ('i32', 'i1')". A condition
# over an array is right.
# Cause: the rule of select makes constants of both numbers with the type of the condition, if no operand has a shape.
# No GPU is needed: the kernel is only lowered. jax 0.12.0.1 does the same (Python 3.12).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q "jax==${JAX:-0.10.2}" "jaxlib==${JAX:-0.10.2}"
JAX_PLATFORMS=cpu PYTHONWARNINGS=ignore "$work/env/bin/python" - <<'EOF'
import contextlib
import io
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh

GPU = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
print("jax", jax.__version__)


def integers(x, y):
    y[0] = jnp.where(x[0] != 0, 32, 1)


def floats(x, y):
    y[0] = jnp.where(x[0] != 0, 0.5, 2.0)


def of_array(x, y):
    y[:] = jnp.where(x[:] != 0, 32, 1)


def added(x, y):
    y[0] = x[0] + jnp.where(x[0] != 0, 32, 1)


def interpreted(kernel, x):
    return pl.pallas_call(kernel, out_shape=x, interpret=True)(x).tolist()


def lowered(kernel, x):
    """The selection in the module of the kernel: its operands, where they are constants, and its type; or the error."""

    def call(x):
        options = {"debug": True, "compiler_params": triton.CompilerParams()}
        return pl.pallas_call(kernel, out_shape=x, **options)(x)

    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=GPU)):
            jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))
    except AssertionError as error:
        return f"AssertionError {error}"
    constants = dict(re.findall(r"(%\w+) = arith\.constant (\S+)", text.getvalue()))
    no, yes, kind = re.search(r"arith\.select %\w+, (%\w+), (%\w+) : (.*?) (?:\"|loc|$)", text.getvalue()).groups()
    return constants.get(no, "?"), constants.get(yes, "?"), kind


seen = {}
for name, kernel, x in (
    ("scalar, 32 or 1", integers, jnp.ones(1, jnp.int32)),
    ("scalar, 0.5 or 2.0", floats, jnp.ones(1, jnp.float32)),
    ("array, 32 or 1", of_array, jnp.ones(4, jnp.int32)),
    ("scalar, 32 or 1, added to an integer", added, jnp.ones(1, jnp.int32)),
):
    seen[name] = lowered(kernel, x)
    print(f"{name}: interpret mode gives {interpreted(kernel, x)}; lowered for CUDA: {seen[name]}")
print("expected: the two numbers, as i32 or f32, each time")
kinds = {name: value if isinstance(value, str) else value[-1] for name, value in seen.items()}
as_described = (
    seen["scalar, 32 or 1"] == ("false", "true", "i1")
    and seen["scalar, 0.5 or 2.0"] == ("false", "false", "i1")
    and kinds["array, 32 or 1"] == "tensor<4xi1>, tensor<4xi32>"
    and "i1" in kinds["scalar, 32 or 1, added to an integer"]
)
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
