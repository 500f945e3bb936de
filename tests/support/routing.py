"""The choice of a router by its definition, in NumPy and float64."""

from __future__ import annotations

import numpy as np

from pallas_kernels.routing import Router


def chosen(logits: np.ndarray, bias: np.ndarray | None, router: Router) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [tokens, top_k] of logits [tokens, experts]."""
    x = logits.astype(np.float64)
    odds = np.exp(x - x.max(axis=1, keepdims=True))
    scores = 1 / (1 + np.exp(-x)) if router.scoring == "sigmoid" else odds / odds.sum(axis=1, keepdims=True)
    choice = scores if bias is None else scores + bias
    if router.groups > 1:
        grouped = choice.reshape(len(x), router.groups, -1)
        totals = np.sort(grouped, axis=-1)[..., -router.group_best :].sum(axis=-1)
        out = np.argsort(-totals, axis=1, kind="stable")[:, router.groups_used :]
        kept = grouped.copy()
        kept[np.arange(len(x))[:, None], out] = -np.inf
        choice = kept.reshape(choice.shape)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : router.top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    return ids, router.scale * (weights / (weights.sum(axis=1, keepdims=True) + router.eps) if router.normalize else weights)
