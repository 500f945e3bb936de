"""`DecodeState`, one donated value with everything that sequences have read, and its operations: new, grow, copy, read, write.

Each of its parts is a tree of arrays [layers, places, ...]; a place belongs to one sequence, or to several that share it. So
the functions here depend only on a part's second axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from ferrum_jax import checks
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Axis
from ferrum_jax.state.kinds import PageKind, RecurrentKind, page_kinds, recurrent_kinds
from ferrum_jax.units import shown_dtype
from pallas_kernels.paged_attention import KV_DTYPES, KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of a model.

    Attributes:
      pools: a KVCache for each of the model's `page_kinds`, all with the same page_size.
      recurrent: for each of its `recurrent_kinds`, float32 arrays [layers, states, ...] by name.
    """

    pools: tuple[KVCache, ...]
    recurrent: tuple[dict[str, jax.Array], ...] = ()

    @property
    def parts(self) -> tuple[Any, ...]:
        """Trees of arrays [layers, places, ...]: the pools, then all recurrent state."""
        return (*self.pools, self.recurrent) if self.recurrent else self.pools

    def with_parts(self, parts: Sequence[Any]) -> DecodeState:
        """A state like this with these parts."""
        pools = len(self.pools)
        return DecodeState(tuple(parts[:pools]), *parts[pools:])

    @property
    def num_pages(self) -> int:
        """The number of pages of the smallest pool."""
        return min(pool.num_pages for pool in self.pools)

    @property
    def page_size(self) -> int:
        return self.pools[0].page_size

    @property
    def counts(self) -> list[int]:
        """The number of places of each part."""
        return [jax.tree.leaves(part)[0].shape[1] for part in self.parts]

    def copy_states(self, sources: jax.Array, targets: jax.Array) -> DecodeState:
        """The state with recurrent states copied from sources to targets, int32 [N] each; a target beyond the end copies
        nothing."""
        return dataclasses.replace(self, recurrent=_copied(self.recurrent, sources, targets))


def kv_dtype(dtype: DTypeLike) -> str:
    """JAX's name of a KV dtype, one of KV_DTYPES; "fp8" means float8_e4m3fn. ValueError for anything else."""
    name = "float8_e4m3fn" if isinstance(dtype, str) and dtype == "fp8" else checks.dtype_name(dtype)
    if name not in KV_DTYPES:
        raise ValueError(f"kv_dtype {dtype!r} is not supported; supported: {', '.join(map(shown_dtype, KV_DTYPES))}")
    return name


def bytes_per_token(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of one token's keys and values in all layers, scales included."""
    name = kv_dtype(dtype)
    return sum(kind.bytes_per_token(name) for kind in page_kinds(config))


def new_cache(
    config: ModelConfig,
    *,
    num_pages: int,
    page_size: int = 16,
    dtype: DTypeLike = "float32",
    num_states: int | None = None,
) -> KVCache | DecodeState:
    """An empty cache: a KVCache if the model's layers are all of one kind, else a DecodeState with a pool for each kind.

    Args:
      config: of the model.
      num_pages: pages of each pool; page p has the slots p * page_size to (p + 1) * page_size - 1.
      page_size: tokens per page.
      dtype: float32, bfloat16, float16, int8 (one scale for each token and head) or float8_e4m3fn ("fp8").
      num_states: the number of states for layers that recur; None: as many as pages.

    Raises:
      ValueError: for another dtype, and for a cache without pages or tokens.
    """
    states = num_pages if num_states is None else num_states
    state = new_state(config, pages=num_pages, page_size=page_size, dtype=dtype, num_states=states)
    return state if len(state.parts) > 1 else state.pools[0]


def new_state(
    config: ModelConfig, *, pages: int | Sequence[int], page_size: int, dtype: DTypeLike, num_states: int = 0
) -> DecodeState:
    """An empty state with `pages` pages: one number for each of the model's kinds, or one for all. The rest is as in
    `new_cache`."""
    dtype, kinds = kv_dtype(dtype), page_kinds(config)
    counts = list(pages) if isinstance(pages, Sequence) else [pages] * len(kinds)
    if min(counts) < 1 or page_size < 1:
        raise ValueError(f"a cache needs at least one page and one token a page, not {min(counts)} and {page_size}")
    pools = (
        KVCache.empty(len(kind.layers), count, page_size, kind.kv_heads, kind.head_dim, dtype, kind.latent)
        for kind, count in zip(kinds, counts, strict=True)
    )
    recurrent = (
        {name: jnp.zeros((len(kind.layers), num_states, *shape), jnp.float32) for name, shape in kind.kept}
        for kind in recurrent_kinds(config)
    )
    return DecodeState(tuple(pools), tuple(recurrent))


def state_axes(config: ModelConfig, state: DecodeState) -> DecodeState:
    """What the dimensions of a state's arrays are: a state of tuples of `Axis`. config: of what one device computes, whose
    heads stay together; the scales are those of one device's heads after the other's."""
    layer, rows = Axis("layer"), Axis("row")

    def of_pool(pool: KVCache, kind: PageKind) -> KVCache:
        head = pool.rows // pool.kv_heads * kind.kv_heads
        pages: Any = (layer, Axis("page"), rows, Axis("kv_heads", head), Axis("head"))
        scales: Any = (layer, Axis("page"), Axis("kv_heads", head * pool.page_size))
        return KVCache(pages, None if pool.scales is None else scales, pool.dtype)

    def of_array(kind: RecurrentKind, name: str, shape: tuple[int, ...]) -> Any:
        return layer, Axis("state"), *map(Axis, dict(kind.axes).get(name, ("row",) * len(shape)))

    recurrent = ({name: of_array(kind, name, shape) for name, shape in kind.kept} for kind in recurrent_kinds(config))
    return DecodeState(tuple(map(of_pool, state.pools, page_kinds(config))), tuple(recurrent))


def widened(state: DecodeState, counts: Sequence[int]) -> DecodeState:
    """A device's state as `jax.ShapeDtypeStruct`s: the one of all devices, of which counts[i] have different heads in pool
    i."""

    def wider(array: Any, axis: int, count: int) -> Any:
        shape = [size * count if place == axis else size for place, size in enumerate(array.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    def of(pool: KVCache, count: int) -> KVCache:
        scales: Any = pool.scales
        return KVCache(wider(pool.pages, 3, count), None if scales is None else wider(scales, 2, count), pool.dtype)

    return dataclasses.replace(state, pools=tuple(map(of, state.pools, counts)))


def _copied(part: Any, sources: jax.Array, targets: jax.Array) -> Any:
    return jax.tree.map(lambda a: a.at[:, targets].set(a.at[:, sources].get(mode="clip"), mode="drop"), part)


def copy_places(state: DecodeState, sources: jax.Array, targets: jax.Array) -> DecodeState:
    """Copies places to places of the same part in all layers: int32 [parts, N] each; a target beyond the end copies nothing."""
    return state.with_parts([_copied(*each) for each in zip(state.parts, sources, targets, strict=True)])


def grow(state: DecodeState, *, pages: tuple[int, ...]) -> DecodeState:
    """The same state with pages[i] pages in pool i."""

    def pad(array: jax.Array, size: int) -> jax.Array:
        return jnp.pad(array, [(0, size - extent if axis == 1 else 0) for axis, extent in enumerate(array.shape)])

    pools = [jax.tree.map(lambda array: pad(array, size), pool) for pool, size in zip(state.pools, pages, strict=True)]  # noqa: B023
    return dataclasses.replace(state, pools=tuple(pools))


def read_places(state: DecodeState, places: Sequence[Any]) -> DecodeState:
    """The contents of some places of each part (int32 [N], N may differ by part), as a state of only these."""
    return state.with_parts(
        [jax.tree.map(lambda array: array[:, ids], part) for part, ids in zip(state.parts, places, strict=True)]  # noqa: B023
    )


def write_places(state: DecodeState, places: Sequence[Any], content: DecodeState) -> DecodeState:
    """Writes the result of `read_places` to places of each part; a place beyond the end is not written."""

    def write(part: Any, ids: jax.Array, new: Any) -> Any:
        return jax.tree.map(lambda array, rows: array.at[:, ids].set(rows, mode="drop"), part, new)

    return state.with_parts([write(*each) for each in zip(state.parts, places, content.parts, strict=True)])


export.register_pytree_node_serialization(
    KVCache,
    serialized_name="ferrum_jax.KVCache",
    serialize_auxdata=lambda static: static[0].encode(),
    deserialize_auxdata=lambda data: (data.decode(),),
)
export.register_pytree_node_serialization(
    DecodeState,
    serialized_name="ferrum_jax.DecodeState",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: (),
)
