"""An interpolated Kneser-Ney n-gram model (Kneser and Ney 1995; Chen and Goodman 1998) over token ids: the baseline that the
tiny model has to beat.

An n-gram is one number, its tokens as digits, so counts are sorted arrays and a text is scored in a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """N-grams of one length: sorted keys int64 and their counts; their contexts, with the sum of counts and the number of
    distinct tokens that follow; the discount."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    followers: np.ndarray
    discount: float


class NGram:
    """P(token | the `order` - 1 tokens before it). texts: the token ids of each, ending with `end`; the context before a text's
    first token is filled with `end`. The longest n-grams are counted by how often they occur, shorter ones by how many
    different tokens come before them."""

    def __init__(self, texts: Sequence[np.ndarray], order: int, vocab_size: int, end: int) -> None:
        if vocab_size**order >= 2**63:
            raise ValueError(f"{order}-grams over {vocab_size} tokens do not fit into 64 bits")
        self.order, self.vocab_size, self.end = order, vocab_size, end
        keys, counts = np.unique(np.concatenate([self._keys(text) for text in texts]), return_counts=True)
        self.orders: list[Order] = []  # the longest first
        for length in range(order, 0, -1):
            self.orders.append(_order(keys, counts, vocab_size))
            keys, counts = np.unique(keys % vocab_size ** (length - 1), return_counts=True)

    def logprobs(self, text: np.ndarray) -> np.ndarray:
        """Natural logarithm of the probability of each token of a text: float64 [tokens]."""
        keys = self._keys(text)
        probability = np.full(len(text), 1 / self.vocab_size)
        for length, order in enumerate(reversed(self.orders), 1):
            own = keys % self.vocab_size**length
            place, known = _find(order.contexts, own // self.vocab_size)
            total, followers = order.totals[place], order.followers[place]
            here, seen = _find(order.keys, own)
            count = np.where(seen, order.counts[here], 0)
            mixed = (np.maximum(count - order.discount, 0) + order.discount * followers * probability) / total
            probability = np.where(known, mixed, probability)
        return np.log(probability)

    def _keys(self, text: np.ndarray) -> np.ndarray:
        """The n-gram that ends with each token."""
        padded = np.concatenate([np.full(self.order - 1, self.end), np.asarray(text)]).astype(np.int64)
        keys = np.zeros(len(text), np.int64)
        for place in range(self.order):
            keys = keys * self.vocab_size + padded[place : place + len(text)]
        return keys


def _order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> Order:
    contexts, first = np.unique(keys // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, first)
    followers = np.diff([*first, len(keys)])
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    return Order(keys, counts, contexts, totals, followers, once / (once + 2 * twice) if once else 0.5)


def _find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each wanted key, and whether it is there."""
    place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return place, sorted_keys[place] == wanted
