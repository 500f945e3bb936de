"""The memory that a model needs on a device, and how much JAX may use: the same count for loading, `plan`, `doctor` and
OutOfMemoryError.

On an accelerator the limit is that of JAX's allocator, which takes a fraction of a GPU. On a CPU it is what the machine and
the control groups of this process have free. It includes swap and memory that the system can reclaim, so that nothing is
refused that would have worked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.distributed.share import head_axes, share
from ferrum_jax.errors import OutOfMemoryError
from ferrum_jax.state import DecodeState, new_state, page_kinds, state_axes, widened
from ferrum_jax.units import readable_bytes

HELP = (
    "What helps: a smaller quantization of the model, a shorter context (--max-seq-len), fewer rows at a time, or a "
    "narrower KV cache (--kv-dtype); `ferrum-jax plan` counts all of it for a device beforehand"
)
_DEFAULT_FRACTION = 0.75  # of a GPU's memory, which XLA takes by default


@dataclasses.dataclass(frozen=True)
class Limit:
    """The bytes that JAX may use, those already in use, and in words what sets the limit."""

    total: int
    in_use: int
    counted: str

    @property
    def free(self) -> int:
        return max(0, self.total - self.in_use)

    def __str__(self) -> str:
        return f"{readable_bytes(self.free)} free of {readable_bytes(self.total)} ({self.counted})"


def nbytes(tree: Any) -> int:
    """Bytes that a device holds of the arrays, or `jax.ShapeDtypeStruct`s, of a pytree."""
    return sum(math.prod(_held(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _held(leaf: Any) -> tuple[int, ...]:
    """The shape of a device's part."""
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def abstract_state(
    config: ModelConfig,
    pages: int | Sequence[int],
    page_size: int,
    dtype: str,
    placement: Placement,
    num_states: int = 1,
) -> DecodeState:
    """The state as `jax.ShapeDtypeStruct`s with shardings."""
    pages = tuple(pages) if isinstance(pages, Sequence) else pages
    return _abstract_state(config, pages, page_size, dtype, placement, num_states)


@functools.lru_cache(64)  # tracing takes a millisecond, and each call of `generate` asks several times
def _abstract_state(
    config: ModelConfig, pages: int | tuple[int, ...], page_size: int, dtype: str, placement: Placement, num_states: int
) -> DecodeState:
    own, axes = share(config, placement), head_axes(placement)
    make = functools.partial(new_state, own, pages=pages, page_size=page_size, dtype=dtype, num_states=num_states)
    with placement.as_default():
        state = jax.eval_shape(make)
    if axes:
        counts = [1 if kind.latent else placement.parts((axes,))[0] for kind in page_kinds(own)]
        state = widened(state, counts)
    return placement.placed(state, state_axes(own, state))


# Limits


def gpu_fraction() -> tuple[float, str]:
    """The fraction of a GPU's memory that JAX takes, and the setting it comes from. Raises ValueError for an invalid
    setting."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := os.environ.get(name):
            try:
                fraction = float(text)
            except ValueError:
                fraction = 0.0
            if not 0 < fraction <= 1:
                raise ValueError(f"{name} is {text!r}; it must be a number above 0 and at most 1")
            return fraction, name
    return _DEFAULT_FRACTION, "JAX's default; XLA_CLIENT_MEM_FRACTION sets another"


def device_limit(device: jax.Device) -> Limit | None:
    """The memory of a device of this machine, or None if it is unknown."""
    if device.platform == "cpu":
        return host_limit()
    stats = device.memory_stats() or {}
    if not stats.get("bytes_limit"):
        return None
    counted = f"what JAX allocates from on {device.device_kind}"
    if device.platform == "gpu":
        counted += f"; XLA_CLIENT_MEM_FRACTION sets its part of the device's memory, {gpu_fraction()[0]} now"
    return Limit(stats["bytes_limit"], stats.get("bytes_in_use", 0), counted)


def limit(placement: Placement) -> Limit | None:
    """The memory of the device of a placement that has the least free, or None if one is unknown."""
    limits = [device_limit(device) for device in placement.devices]
    known = [limit for limit in limits if limit]
    return min(known, key=lambda limit: limit.free) if known == limits else None


def host_limit(root: Path = Path("/")) -> Limit | None:
    """Memory and swap of this machine (its /proc and /sys are under `root`), or the limit of a control group if that is less.
    Memory that can be reclaimed is not in use. None on systems without /proc."""
    machine = _numbers(root / "proc/meminfo")
    if not machine.keys() >= {"MemTotal", "MemAvailable"}:
        return None
    swap, swap_free = machine.get("SwapTotal", 0) * 1024, machine.get("SwapFree", 0) * 1024
    total, available = machine["MemTotal"] * 1024 + swap, machine["MemAvailable"] * 1024 + swap_free
    limits = [Limit(total, total - available, "memory and swap of this machine")]
    for group in _control_groups(root):
        most = next((n for n in (_number(group / name) for name in ("memory.max", "memory.limit_in_bytes")) if n), None)
        if most is not None and most < machine["MemTotal"] * 1024:
            used = _numbers(group / "memory.stat")
            held = used.get("anon", used.get("total_rss", 0)) + used.get("shmem", used.get("total_shmem", 0))
            limits.append(Limit(most + swap, held + swap - swap_free, "the control group's limit, and swap"))
    return min(limits, key=lambda limit: limit.free)


def _control_groups(root: Path) -> Iterator[Path]:
    """The directories of this process's control groups for memory, and of the groups that contain them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        for mount in [root / "sys/fs/cgroup" / controllers, *([root / "sys/fs/cgroup/unified"] if not controllers else [])]:
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount) and folder.is_dir())


def _numbers(path: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in re.findall(r"^(\w+):? +(\d+)", path.read_text(), re.MULTILINE)}
    except OSError:
        return {}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" means no limit


# Errors


def require(needed: int, placement: Placement, what: str) -> None:
    """Raises OutOfMemoryError with the text `what` if fewer bytes than `needed` are free on a device."""
    there = limit(placement)
    if there is not None and needed > there.free:
        raise OutOfMemoryError(f"{what}; {placement} has {there}. {HELP}")


@contextlib.contextmanager
def explained(placement: Placement, count: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside the block into an OutOfMemoryError with the text `count()`."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        there = limit(placement)
        known = f"{placement} has {there}" if there else f"the limit of {placement} is not known"
        raise OutOfMemoryError(f"out of memory: {count()}; {known}. {HELP}") from error
