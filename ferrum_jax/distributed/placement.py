"""`Placement`: where a model's arrays are. A mesh of devices, rules, and the kind of the devices; one device is a mesh of one.

The one idea: an array says only what its dimensions are (`Axis`), and the rules say over which axes of the mesh a dimension
with that name is cut. Shardings, the shapes and bytes on each device, and where a tensor is read to all follow from that.

A dimension is cut into equal parts, and only between runs: what belongs together, such as the rows of a head or the columns
of a block, is never in two places. An axis of the mesh that does not divide the number of runs is left out, and then the
devices along it hold the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ferrum_jax.distributed.axes import AXES, RULES, Axis
from pallas_kernels import dispatch

Cuts = tuple[tuple[str, ...], ...]  # by dimension, the axes of the mesh that it is cut over


@dataclasses.dataclass(frozen=True, repr=False)
class Placement:
    """Where arrays are. Compiled programs belong to one placement, and to shapes.

    mesh: of devices that are there, or an AbstractMesh of devices that are only planned or compiled for; axes among AXES.
    target: what the devices are, for the choice of memory layouts and backends. rules: as RULES.
    """

    mesh: Mesh | AbstractMesh
    target: dispatch.Target
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES, hash=False)

    @classmethod
    def of(cls, device: jax.Device | None = None) -> Placement:
        """On one device; None: JAX's first."""
        return cls.over(Mesh(np.array([device or jax.devices()[0]]), AXES[-1:]))

    @classmethod
    def over(cls, mesh: Mesh) -> Placement:
        """On the devices of a mesh. Raises ValueError for an axis that is not in AXES."""
        if unknown := set(mesh.axis_names) - set(AXES):
            raise ValueError(f"mesh has an axis {min(map(str, unknown))!r}; the axes of a mesh are {', '.join(AXES)}")
        mesh = Mesh(mesh.devices, mesh.axis_names)  # with the kind of axes that `shard_map` and JAX's functions share
        return cls(mesh, dispatch.target_of(mesh.devices.flat[0]))

    @classmethod
    def named(cls, sizes: Mapping[str, int]) -> Placement:
        """On the first devices of JAX, as many along each axis as `sizes` says. Raises ValueError if JAX has fewer."""
        devices, count = jax.devices(), math.prod(sizes.values())
        if count > len(devices):
            names = ",".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"mesh: {names!r} has {count} devices; JAX has {len(devices)}, of {devices[0].platform}")
        axes = [name for name in AXES if name in sizes]
        return cls.over(Mesh(np.array(devices[:count]).reshape([sizes[name] for name in axes]), axes))

    @classmethod
    def abstract(cls, target: dispatch.Target, sizes: Mapping[str, int] = MappingProxyType({})) -> Placement:
        """On devices that need not be there: as many along each axis as `sizes` says, by default one in all."""
        return cls(AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES), target)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items() if size > 1)
        kind = self.target if isinstance(self.mesh, AbstractMesh) else self.devices[0]
        return f"{sizes} of {self.target}" if sizes else str(kind)

    def __repr__(self) -> str:
        return f"<Placement {self}>"

    # The devices

    @functools.cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        """Those that are there."""
        return () if isinstance(self.mesh, AbstractMesh) else tuple(self.mesh.devices.flat)

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.mesh.shape.values())

    @property
    def device(self) -> jax.Device:
        """The first device."""
        return self.devices[0]

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu"."""
        return self.device.platform if self.devices else self.target.platform

    @contextlib.contextmanager
    def as_default(self) -> Iterator[None]:
        """A block in which functions are traced for the target, and arrays are made on the first device by default."""
        with dispatch.on(self.target), jax.default_device(self.device) if self.devices else contextlib.nullcontext():
            yield

    # Arrays

    def cuts(self, axes: Sequence[Axis], shape: Sequence[int]) -> Cuts:
        """The axes of the mesh over which each dimension is cut, each of them at most once."""
        used: set[str] = set()
        found = []
        for axis, size in zip(axes, shape, strict=True):
            runs, over = 1 if size % axis.run else size // axis.run, []
            for name in self.rules.get(axis.name, ()):
                count = self.mesh.shape.get(name, 1)
                if count > 1 and name not in used and runs % count == 0:
                    runs //= count
                    over.append(name)
            used |= set(over)
            found.append(tuple(over))
        return tuple(found)

    def parts(self, cuts: Cuts) -> tuple[int, ...]:
        """Into how many parts each dimension is cut."""
        return tuple(math.prod(self.mesh.shape[name] for name in over) for over in cuts)

    def over_cuts(self, cuts: Cuts) -> Sharding:
        """The sharding of an array that is cut like this.

        On one device it is a SingleDeviceSharding. A call of a compiled program costs the same with the NamedSharding of a
        mesh of one, but this is what JAX gives arrays that are made there without a sharding, so nothing has to be converted.
        """
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec(*(over or None for over in cuts)))

    def sharding(self, axes: Sequence[Axis], shape: Sequence[int]) -> Sharding:
        """The sharding of an array with these dimensions."""
        return self.over_cuts(self.cuts(axes, shape))

    @functools.cached_property
    def replicated(self) -> Sharding:
        """The sharding of arrays that every device holds whole."""
        return self.over_cuts(())

    def placed(self, tree: Any, axes: Any) -> Any:
        """Arrays, or their shapes, as `jax.ShapeDtypeStruct`s with shardings. axes: a tree like it, of tuples of `Axis`."""

        def place(leaf: Any, axes: Sequence[Axis]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(axes, leaf.shape))

        return jax.tree.map(place, tree, axes)

    def everywhere(self, tree: Any) -> Any:
        """Arrays, or their shapes, as `jax.ShapeDtypeStruct`s that every device holds whole."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated), tree)

    def put(self, tree: Any) -> Any:
        """The arrays of a pytree on every device."""
        return jax.device_put(tree, self.replicated)

    def zeros(self, tree: Any) -> Any:
        """Zeros for `jax.ShapeDtypeStruct`s with shardings."""
        if self.platform == "cpu":  # without a program, whose compilation would take more memory than many states
            return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), tree)
        with self.as_default():
            return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), tree)


def mesh_sizes(text: str) -> dict[str, int]:
    """The number of devices along each axis that a text such as "expert=4,tensor=2" states. Raises ValueError for another
    text."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name in sizes or name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: {part.strip()!r} in {text!r} is not an axis ({', '.join(AXES)}) and its number of devices, as in "
                "'expert=4,tensor=2'"
            )
        sizes[name] = int(size)
    return sizes
