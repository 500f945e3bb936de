"""The names of the dimensions of arrays, and the axes of a mesh that each is cut over. Needs no JAX, so that headers of files
can be described without it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

AXES = ("data", "expert", "tensor")  # of meshes: rows of a batch, whole experts, parts of a layer
HEADS = ("heads", "query_heads", "kv_heads", "gated_heads", "query_rows")  # cut together or not at all
RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # of parameters
        "vocab": ("expert", "tensor"),
        "hidden": (),
        "heads": ("tensor",),
        "query_heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head": (),
        "rotated": (),
        "width": ("tensor",),
        "expert": ("data", "expert"),  # the rows of all replicas of attention share the experts
        "expert_width": ("tensor",),
        "routed": (),  # experts as the router scores them: every device chooses
        "position": (),
        "type": (),
        "gated_heads": ("tensor",),  # queries, each with its gate
        "shared_width": ("tensor",),
        # of attention over latent vectors
        "query_rows": ("tensor",),
        "query_width": (),
        "latent": (),
        "latent_rows": (),
        "nope": (),
        "value": (),
        # of the embedding of each token that a layer alone gets
        "input": (),
        "inputs": (),
        "input_vocab": (),
        "one": (),
        # of gated delta nets and short convolutions, which every device has whole
        "channels": (),
        "gated_channels": (),
        "taps": (),
        "values": (),
        "value_heads": (),
        "value_dim": (),
        "beta_alpha": (),
        # of state
        "layer": (),
        "page": ("data",),
        "state": ("data",),
        "row": (),  # numbers of one page, state or slot
    }
)
"""Over which axes of a mesh a dimension is cut, as far as each divides it; () for none: every device has all of it."""


class Axis(NamedTuple):
    """A dimension of an array: its logical name, a key of the rules, and how many neighbors are never cut apart."""

    name: str
    run: int = 1
