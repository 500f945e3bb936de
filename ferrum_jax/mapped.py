"""Functions of a model as one program of all devices of a mesh, in which each computes on its own parts.

The one idea: the whole program runs inside `shard_map`, so kernels, loops and sampling see a smaller model on one device.
Where parts have to come together (`quantized`, `models`), the code says so by a sum or a gathering over axes of the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ferrum_jax.distributed.placement import Placement
from ferrum_jax.distributed.share import share
from ferrum_jax.quantized import QuantizedTensor
from ferrum_jax.state import DecodeState, KVCache
from pallas_kernels.blocks.layouts import LAYOUTS

_EVERYWHERE = PartitionSpec()


def mapped(placement: Placement, function: Callable, args: tuple, static: Mapping[str, Any]) -> tuple[Callable, Any]:
    """`function` with its static arguments over the parts of `args` on each device, and the shardings of `args`; on one device
    the function as it is, and None.

    Parameters and state are where their shardings say. Other arguments and results are the same on every device, but for
    states, all of which are cut like the one that has shardings. A static `config` becomes what one device computes.
    """
    if placement.size == 1:
        return functools.partial(function, **static), None
    if "config" in static:
        static = {**static, "config": share(static["config"], placement)}
    state = next((_specs(node) for node in _nodes(args) if _is_state(node) and _is_placed(node)), [])
    specs = [spec for node in _nodes(args) for spec in (state if _is_state(node) else _specs(node))]
    structure = jax.tree.structure(jax.tree.map(_part, args, is_leaf=_is_tensor))

    def on_each(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(structure, leaves), **static)

    def over(out_specs: Any) -> Callable:
        return jax.shard_map(on_each, mesh=placement.mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)

    results = jax.eval_shape(over(_EVERYWHERE), *jax.tree.leaves(args))
    found = [spec for node in _nodes(results) for spec in (state if _is_state(node) else [_EVERYWHERE])]
    program = over(jax.tree.unflatten(jax.tree.structure(results), found))
    shardings = [NamedSharding(placement.mesh, spec) for spec in specs]
    return lambda *args: program(*jax.tree.leaves(args)), jax.tree.unflatten(jax.tree.structure(args), shardings)


def _nodes(tree: Any) -> list[Any]:
    """Its states, and the other leaves."""
    return jax.tree.leaves(tree, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, DecodeState | KVCache)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, QuantizedTensor)


def _is_placed(tree: Any) -> bool:
    return all(isinstance(getattr(leaf, "sharding", None), NamedSharding) for leaf in jax.tree.leaves(tree))


def _specs(tree: Any) -> list[PartitionSpec]:
    """Of each leaf."""
    return [leaf.sharding.spec if _is_placed(leaf) else _EVERYWHERE for leaf in jax.tree.leaves(tree)]


def _part(node: Any) -> Any:
    """A tensor that says how it is cut, with a device's number of rows and columns."""
    if not _is_tensor(node) or not _is_placed(node):
        return node
    plane, count = node.planes[0], len(node.matrix)
    along = LAYOUTS[node.memory_layout].AXES if count == 2 else (0,)
    spec = [*plane.sharding.spec, *[None] * plane.ndim][: plane.ndim]
    over = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    local, cut, held = list(node.matrix), [()] * count, plane.sharding.shard_shape(plane.shape)
    for place, axis in enumerate(along, plane.ndim - len(along)):
        cut[axis] = over[place]
        local[axis] //= plane.shape[place] // held[place]
    return dataclasses.replace(node, matrix=tuple(local), cut=(*over[: -len(along)], *cut))
