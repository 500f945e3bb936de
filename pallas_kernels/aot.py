"""Compiles for an accelerator that is not there.

A topology description stands in for the device: XLA, Triton and Mosaic run in full, limits of shared memory, VMEM and HBM are
enforced, and `memory_analysis()` of the result is the real one. Nothing is run. It needs the wheels of the `aot` extra, none of
which needs a driver: for CUDA jax's plugin (of jax's own version), ptxas and libdevice, for TPU libtpu. A process without an
accelerator should set `JAX_PLATFORMS=cpu`; a compilation that may abort belongs in a separate process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is needed
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import compat, dispatch, extras

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One CUDA device as described by XLA's `GpuTargetConfigProto` (sizes in bytes, rates in bytes/s), from its data sheet."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory: int
    memory_bandwidth: int
    l2: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    threads_per_multiprocessor: int
    fp32_lanes_per_multiprocessor: int
    clock_ghz: float

    @property
    def target(self) -> dispatch.Target:
        return dispatch.Target("gpu", "{}.{}".format(*self.compute_capability))

    def target_config(self) -> str:
        """The proto in text form. Driver and runtime versions decide what XLA may put into CUDA graphs."""
        major, minor = self.compute_capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_multiprocessor}
  threads_per_core_limit: {self.threads_per_multiprocessor}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.fp32_lanes_per_multiprocessor}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU chip: the smallest slice that can be described, the HBM that the compiler allows, bytes, bytes/s."""

    topology: str
    generation: str
    memory: int
    memory_bandwidth: int

    @property
    def target(self) -> dispatch.Target:
        return dispatch.Target("tpu", self.generation)


# fmt: off
GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 15 * GIB, 320_000_000_000, 4 << 20, 65536, 65536, 1024, 64, 1.59),
    "a100-40g":
        Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40 * GIB, 1_555_000_000_000, 40 << 20, 167936, 166912, 2048, 64, 1.41),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 22 * GIB, 300_000_000_000, 48 << 20, 102400, 101376, 1536, 128, 2.04),
    "h100":
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 79 * GIB, 3_352_000_000_000, 50 << 20, 233472, 232448, 2048, 128, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 139 * GIB, 4_800_000_000_000, 60 << 20, 233472, 232448, 2048, 128, 1.98),
}
# fmt: on
SAME_AS = {"a100": "a100-40g"}  # a name that leaves the memory open means the device with less
TPUS = {
    "v5e": Tpu("v5e:2x2", "v5e", int(15.75 * GIB), 819_000_000_000),
    "v6e": Tpu("v6e:2x2", "v6e", int(31.24 * GIB), 1_640_000_000_000),
    "v5p": Tpu("v5p:2x2x1", "v5p", int(95.73 * GIB), 2_765_000_000_000),
}
TARGETS: dict[str, Gpu | Tpu] = {**GPUS, **TPUS}
_WHEELS = {"gpu": ("jax_cuda13_plugin", "nvidia"), "tpu": ("libtpu",)}


def missing(name: str) -> str | None:
    """What is needed to compile for the target but not installed, or None. KeyError for an unknown target."""
    absent = [wheel for wheel in _WHEELS[TARGETS[name].target.platform] if importlib.util.find_spec(wheel) is None]
    return f"{', '.join(absent)} ({extras.install('aot')})" if absent else None


@functools.cache
def devices(name: str) -> tuple[Any, ...]:
    """Compile-only devices of a target, a key of TARGETS. KeyError for another name, ModuleNotFoundError without wheels."""
    if absent := missing(name):
        raise ModuleNotFoundError(f"compiling for {name} needs {absent}")
    if name in GPUS:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology="1x1x1", target_config=GPUS[name].target_config()
        )
    else:
        if "TPU_LIBRARY_PATH" not in os.environ:
            import libtpu

            os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name].topology)
    return tuple(topology.devices)


def lower_for(name: str, function: Callable, *args: Any, **jit_options: Any) -> Any:
    """`function` lowered for one device of the target; `args` are pytrees of arrays or `jax.ShapeDtypeStruct`s."""
    mesh = Mesh(np.array(devices(name)[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    fresh = functools.wraps(function)(lambda *args: function(*args))  # jax caches traces by function, not by target
    with compat.abstract_mesh(mesh), dispatch.on(TARGETS[name].target):
        traced = jax.jit(fresh, out_shardings=sharding, **jit_options).trace(*args)
        return traced.lower(lowering_platforms=("cuda" if name in GPUS else "tpu",))


def compile_for(
    name: str, function: Callable, *args: Any, compiler_options: dict[str, Any] | None = None, **jit_options: Any
) -> Any:
    """`function` compiled for one device of the target: a `jax.stages.Compiled` to look at, not to run."""
    return lower_for(name, function, *args, **jit_options).compile(compiler_options)
