"""Which experts a token goes to: those with the best scores, and their weights.

Contract of `route(logits, live, router, bias)`:

* `logits` float32 [tokens, E]; `live` bool [tokens], False for padding; `router`: a `Router`; `bias` float32 [E] or None.
* an expert's score is in the softmax or a sigmoid; the choice is by score plus `bias`, which has no part in the weights. With
  groups, only experts of the best groups are chosen, by the same sums; ties go to the smaller group.
* result: expert_ids int32 [tokens, top_k] by falling score plus bias, ties to the smaller id, the id E if the token is padding;
  expert_weights float32 [tokens, top_k]: `scale` times the scores, with `normalize` divided by `eps` plus their sum over the
  chosen ones (equal weights if that is zero).
* derivative: of expert_weights with respect to the logits.
"""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.routing import xla
from pallas_kernels.routing.parts import Router

__all__ = ["BACKENDS", "Router", "route"]

_GROUPS = "groups of experts"
BACKENDS = (
    dispatch.kernels("triton", __name__, "gpu"),
    dispatch.Backend("xla", lambda case: None, lambda: xla, features=(_GROUPS,)),
)


def route(
    logits: jax.Array,
    live: jax.Array,
    router: Router,
    bias: jax.Array | None = None,
    *,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """(expert_ids int32, expert_weights float32), both [tokens, top_k]. See the module's contract.

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    if logits.ndim != 2 or live.shape != logits.shape[:1] or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"route: logits {logits.shape}, live {live.shape} and a bias do not fit")
    size, rest = divmod(logits.shape[1], router.groups)
    if rest or not 0 < router.top_k <= size * router.groups_used or not 0 < router.group_best <= size:
        groups = f"{router.groups} groups, {router.groups_used} of them by their {router.group_best} best"
        raise ValueError(f"route: top_k {router.top_k} does not fit {logits.shape[1]} experts in {groups}")
    return _route(logits, live, bias, router, dispatch.target("route", implementation))


@derivative_of(lambda *arguments: xla.route(*arguments[:-1]), of=("logits",), static=("router", "target"))
def _route(
    logits: jax.Array, live: jax.Array, bias: jax.Array | None, router: Router, target: dispatch.Target
) -> tuple[jax.Array, jax.Array]:
    features = (_GROUPS,) if router.groups > 1 else ()
    case = dispatch.Case("route", target, "F32", logits.dtype.name, shape=(*logits.shape, router.top_k), features=features)
    return dispatch.choose(case, BACKENDS).route(logits, live, bias, router)
