"""The kinds of state of a model's layers: layers with the same window and shape of keys and values share a pool of pages,
layers with the same recurrent state share arrays. A layer that reads another layer's keys and values has no pages."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ferrum_jax.config import Attention, ModelConfig, Recurrent
from pallas_kernels import paged_attention


class PageKind(NamedTuple):
    """Layers that share a pool of pages, in order; `window` is the number of positions that their queries see (0: all).
    latent: the pages hold keys whose beginnings are the values."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int
    latent: bool = False

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token's keys and values, scales included."""
        return len(self.layers) * paged_attention.bytes_per_token(dtype, self.kv_heads, self.head_dim, self.latent)


class RecurrentKind(NamedTuple):
    """Layers that recur and keep the same state, in order; `kept`: names and shapes of float32 arrays; `axes`: names and axes
    of the arrays that devices may share."""

    layers: tuple[int, ...]
    kept: tuple[tuple[str, tuple[int, ...]], ...]
    axes: tuple[tuple[str, tuple[str, ...]], ...]


def page_kinds(config: ModelConfig) -> tuple[PageKind, ...]:
    """The kinds of pages of a model, in the order of its layers. If no layer attends, there is one kind without layers, whose
    pages only count positions."""
    groups: dict[tuple[int, int, int, bool], list[int]] = {}
    for number, layer in enumerate(config.layers):
        if isinstance(mixer := layer.mixer, Attention) and not mixer.shared_kv:
            groups.setdefault(_shape(mixer), []).append(number)
    return tuple(PageKind(tuple(numbers), *kind) for kind, numbers in groups.items()) or (PageKind((), 1, 1, 0),)


def kv_layers(config: ModelConfig) -> tuple[int, ...]:
    """For each layer, the layer whose keys and values it reads: itself, or for `shared_kv` the last one before it that has
    some of the same shape and window. ValueError if there is none."""
    last: dict[tuple[int, int, int, bool], int] = {}
    found = list(range(config.num_layers))
    for number, layer in enumerate(config.layers):
        if isinstance(mixer := layer.mixer, Attention):
            if not mixer.shared_kv:
                last[_shape(mixer)] = number
            elif _shape(mixer) in last:
                found[number] = last[_shape(mixer)]
            else:
                raise ValueError(f"layer {number} shares keys and values, but no layer before it has some of its kind")
    return tuple(found)


def _shape(mixer: Attention) -> tuple[int, int, int, bool]:
    return mixer.num_kv_heads, mixer.head_dim, mixer.window, mixer.latent is not None


def recurrent_kinds(config: ModelConfig) -> tuple[RecurrentKind, ...]:
    """The kinds of recurrent state of a model, in the order of its layers."""
    groups: dict[tuple, list[int]] = {}
    for number, layer in enumerate(config.layers):
        if isinstance(layer.mixer, Recurrent):
            kind = tuple(layer.mixer.kept.items()), tuple(layer.mixer.kept_axes.items())
            groups.setdefault(kind, []).append(number)
    return tuple(RecurrentKind(tuple(numbers), *kind) for kind, numbers in groups.items())


def kind_names(kinds: tuple[PageKind, ...]) -> list[str]:
    """A name for each kind: "full" or "window_4096", with heads and head width if several would have the same name."""
    names = [f"window_{kind.window}" if kind.window else "full" for kind in kinds]
    shapes = [f"{kind.kv_heads}x{kind.head_dim}" for kind in kinds]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}_{shape}" for name, shape in zip(names, shapes, strict=True)]
