"""Which kinds of state a model's layers have: layers whose keys and values look alike share a pool of pages."""

from __future__ import annotations

from typing import NamedTuple

from ferrum_jax.config import ModelConfig


class PageKind(NamedTuple):
    """Layers that share a pool of pages, in order; `window` is the number of positions that their queries see (0: all)."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int


def page_kinds(config: ModelConfig) -> tuple[PageKind, ...]:
    """The kinds of pages of a model, in the order in which its layers have them."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, layer in enumerate(config.layers):
        mixer = layer.mixer
        groups.setdefault((mixer.num_kv_heads, mixer.head_dim, mixer.window), []).append(number)
    return tuple(PageKind(tuple(numbers), *kind) for kind, numbers in groups.items())
