#!/usr/bin/env bash
# orbax-checkpoint: a key with a dot and the nested keys it spells share one array; one of the two is lost.
#
# Expected: restore returns the tree that was saved, or save refuses it.
# Seen: {"a.b": 1, "a": {"b": 2}} comes back with one of the two numbers in both places (which one varies),
# with and without a target tree, without a warning; the metadata lists both leaves, both with the name
# "a.b". Trees that hold flat parameter names of torch ("lora.alpha") next to nested ones of flax ("lora":
# {"alpha": ...}) are of this kind. A slash in a key is kept apart.
# Cause: an array is stored under the path of its keys joined with dots, without an escape for a dot inside a
# key, so both leaves write to and read from one name.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/env/bin/python" - "$work" <<'EOF' 2>"$work/log" || { tail -n 20 "$work/log" >&2; exit 1; }
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

print("orbax-checkpoint", version("orbax-checkpoint"), "jax", jax.__version__)
trees = {
    "dot": {"a.b": jnp.full(2, 1.0), "a": {"b": jnp.full(2, 2.0)}, "c": jnp.full(2, 3.0)},
    "slash": {"a/b": jnp.full(2, 1.0), "a": {"b": jnp.full(2, 2.0)}, "c": jnp.full(2, 3.0)},
}
seen = {}
for name, tree in trees.items():
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{sys.argv[1]}/{name}", tree)
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(f"{sys.argv[1]}/{name}")
        targeted = checkpointer.restore(f"{sys.argv[1]}/{name}", jax.tree.map(jnp.zeros_like, tree))
    same = [jax.tree.map(lambda a, b: bool((a == b).all()), tree, restored) for restored in (plain, targeted)]
    seen[name] = [all(jax.tree.leaves(leaves)) for leaves in same]
    print(f"{name}: saved {jax.tree.map(jnp.max, tree)}, restored {jax.tree.map(jnp.max, plain)}")
    print("  equal to what was saved, without and with a target:", same)
print("expected: equal")
as_described = seen == {"dot": [False, False], "slash": [True, True]}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
