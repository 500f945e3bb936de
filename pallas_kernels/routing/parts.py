"""How a router chooses: `Router`."""

from __future__ import annotations

from typing import NamedTuple


class Router(NamedTuple):
    """What a router makes of its logits (the contract is in pallas_kernels.routing).

    Attributes:
      top_k: the experts of a token.
      normalize: whether the weights are divided by their sum plus `eps`.
      scale: multiplies the weights, after that.
      scoring: the scores of the experts are the "softmax" of all logits, or the "sigmoid" of each.
      groups: the number of groups of experts, all of one size and one after the other.
      groups_used, group_best: a token's experts come from `groups_used` groups, those with the largest sums of their
        `group_best` best.
    """

    top_k: int
    normalize: bool = True
    scale: float = 1.0
    scoring: str = "softmax"
    eps: float = 0.0
    groups: int = 1
    groups_used: int = 1
    group_best: int = 1
