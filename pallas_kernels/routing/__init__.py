"""Which experts a token goes to: the top_k of a router's softmax and their weights.

Contract of `route(logits, live, top_k, normalize, scale)`:

* `logits` float32 [tokens, E]; `live` bool [tokens], False for padding.
* result: expert_ids int32 [tokens, top_k] by falling probability, ties to the smaller id, the id E if the token is padding;
  expert_weights float32 [tokens, top_k]: `scale` times the probabilities, with `normalize` divided by their sum over the chosen
  ones (equal weights if that sum is zero).
* derivative: of expert_weights with respect to the logits.
"""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.routing import xla

BACKENDS = (dispatch.kernels("triton", __name__, "gpu"), dispatch.Backend("xla", lambda case: None, lambda: xla))


def route(
    logits: jax.Array,
    live: jax.Array,
    top_k: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """(expert_ids int32, expert_weights float32), both [tokens, top_k]. See the module's contract.

    Raises:
      ValueError: if shapes do not fit, or the forced backend cannot serve the case.
    """
    if logits.ndim != 2 or live.shape != logits.shape[:1] or not 0 < top_k <= logits.shape[1]:
        raise ValueError(f"route: logits {logits.shape}, live {live.shape} and top_k {top_k} do not fit")
    return _route(logits, live, top_k, normalize, scale, dispatch.target("route", implementation))


@derivative_of(lambda *arguments: xla.route(*arguments[:-1]), of=("logits",), static=("top_k", "normalize", "scale", "target"))
def _route(
    logits: jax.Array, live: jax.Array, top_k: int, normalize: bool, scale: float, target: dispatch.Target
) -> tuple[jax.Array, jax.Array]:
    case = dispatch.Case("route", target, "F32", logits.dtype.name, shape=(*logits.shape, top_k))
    return dispatch.choose(case, BACKENDS).route(logits, live, top_k, normalize, scale)
