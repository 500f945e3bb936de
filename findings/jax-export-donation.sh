#!/usr/bin/env bash
# jax.export: arguments that the exported function donates are not donated when it is called.
#
# Expected: export of jit(f, donate_argnums=0) reuses the argument's memory when called, as jit(f, ...) does.
# Seen: the serialized module says that output 0 aliases argument 0, but after call the argument is still
# alive and the compiled program aliases nothing, without a warning, deserialized or not. A decoding step that
# is shipped this way holds its KV cache twice. jit(exported.call, donate_argnums=0) donates, so the program
# that loads the file has to know what was donated; Exported does not have a field for it.
# Cause: the exported module becomes an inner function of the program that call traces, and aliasing
# attributes count on the entry function only, which has those of the outer jit.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flatbuffers==25.12.19
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'EOF'
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import export

print("jax", jax.__version__)
SHAPE = jax.ShapeDtypeStruct((256, 256), jnp.float32)
step = jax.jit(lambda cache: cache + 1, donate_argnums=0)
exported = export.deserialize(export.export(step)(SHAPE).serialize())
print("the module states aliasing:", "aliasing_output" in exported.mlir_module())


def outcome(call: Callable, jitted: Callable) -> tuple[bool, int]:
    """Whether the argument is gone after a call, and how many bytes the compiled program aliases."""
    cache = jnp.zeros(SHAPE.shape)
    call(cache).block_until_ready()
    return cache.is_deleted(), jitted.lower(SHAPE).compile().memory_analysis().alias_size_in_bytes


redonated = jax.jit(exported.call, donate_argnums=0)
seen = {
    "jit": outcome(step, step),
    "exported.call": outcome(exported.call, jax.jit(exported.call)),
    "jit(exported.call, donate_argnums=0)": outcome(redonated, redonated),
}
for name, (gone, aliased) in seen.items():
    print(f"{name}: argument donated {gone}, {aliased} bytes aliased")
print("expected: True and 262144 each time")
as_described = list(seen.values()) == [(True, 262144), (False, 0), (True, 262144)]
as_described = as_described and "aliasing_output" in exported.mlir_module()
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
