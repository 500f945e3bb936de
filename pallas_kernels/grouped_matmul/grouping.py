"""Which rows go to which expert, and in what tiles: a stable counting sort in a handful of XLA fusions, on the device.

A place is a count: how many assignments go to a smaller expert, or to the same one from an earlier row. Few assignments are
compared with each other; many are compared only within their chunk, and a histogram of each chunk gives the rest. There is no
sort and no host synchronization, and the tables always have the size of the worst case.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

DIRECT = 1024  # assignments that are compared with all others
CHUNK = 256


class Tiles(NamedTuple):
    """Work list over rows sorted by expert: tile i is rows [tile_start, tile_start + tile_rows) of one expert.

    All int32. Tiles ascend; those from `num_tiles` on repeat the last expert and have no rows.
    """

    tile_expert: jax.Array  # [tiles]
    tile_start: jax.Array  # [tiles]
    tile_rows: jax.Array  # [tiles]
    num_tiles: jax.Array  # scalar


class Groups(NamedTuple):
    """Assignments sorted by expert, and the tiles of the sorted rows. All int32."""

    order: jax.Array  # [A]: which assignment is at each sorted place
    place: jax.Array  # [A]: where each assignment went; those without an expert come last
    sizes: jax.Array  # [E]: assignments of each expert
    tile_expert: jax.Array
    tile_start: jax.Array
    tile_rows: jax.Array
    num_tiles: jax.Array


def max_tiles(rows: int, num_experts: int, tile_rows: int) -> int:
    """Length of the tables: no routing of `rows` rows has more tiles."""
    return min(rows, num_experts) + rows // tile_rows


def group(experts: jax.Array, num_experts: int, tile_rows: int, *, aligned: bool = False) -> Groups:
    """Sorts assignments `experts` int32 [A] by expert, stably; the id `num_experts` means no expert.

    `tile_rows` and `aligned` as in `tiles`. Larger ids than num_experts are not allowed.
    """
    count = experts.shape[0]
    place, sizes = (_direct if count <= DIRECT else _chunked)(experts, num_experts)
    every = jnp.arange(count, dtype=jnp.int32)
    if count <= DIRECT:
        order = _sum(jnp.where(place[None] == every[:, None], every[None], 0), 1)
    else:
        order = jnp.zeros(count, jnp.int32).at[place].set(every, unique_indices=True, mode="promise_in_bounds")
    return Groups(order, place, sizes, *tiles(sizes, count, tile_rows, aligned=aligned))


def tiles(sizes: jax.Array, rows: int, tile_rows: int, *, aligned: bool = False) -> Tiles:
    """Tiles of up to `tile_rows` rows over sorted rows, of which `sizes` int32 [E] go to each expert (at most `rows` in total).

    A group is cut from its own start; with `aligned`, at the multiples of `tile_rows`, so that no tile straddles one.
    """
    num_experts = sizes.shape[0]
    starts = _before(sizes)
    grid = starts - starts % tile_rows if aligned else starts  # where the first tile of a group would begin
    counts = jnp.where(sizes > 0, -(-(starts + sizes - grid) // tile_rows), 0)
    first = _before(counts)
    num_tiles = _sum(counts, 0)

    i = jnp.arange(max_tiles(rows, num_experts, tile_rows), dtype=jnp.int32)[:, None]
    used = jnp.minimum(i, jnp.maximum(num_tiles - 1, 0))
    mine = (first <= used) & (used < first + counts)  # [tiles, E]
    begin = grid + (used - first) * tile_rows
    start, end = jnp.maximum(begin, starts), jnp.minimum(begin + tile_rows, starts + sizes)

    def of_mine(values: jax.Array) -> jax.Array:
        return _sum(jnp.where(mine, values, 0), 1)

    expert = of_mine(jnp.arange(num_experts, dtype=jnp.int32)[None])
    length = jnp.where(i[:, 0] < num_tiles, of_mine(end - start), 0)
    return Tiles(expert, of_mine(start), length, num_tiles)


def _sum(values: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(values, axis, dtype=jnp.int32)


def _before(values: jax.Array) -> jax.Array:
    """Exclusive sums along the first axis, as one reduction: short axes only."""
    each = jnp.arange(values.shape[0])
    earlier = (each[None, :] < each[:, None]).reshape(*2 * each.shape, *(1,) * (values.ndim - 1))
    return _sum(jnp.where(earlier, values[None], 0), 1)


def _direct(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Places [A] and sizes [E]: every assignment against every other."""
    count = experts.shape[0]
    key = experts * count + jnp.arange(count, dtype=jnp.int32)
    place = _sum(key[None, :] < key[:, None], 1)
    return place, _sum(experts[None, :] == jnp.arange(num_experts, dtype=jnp.int32)[:, None], 1)


def _chunked(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """The same from ranks within chunks and a histogram of each chunk."""
    count = experts.shape[0]
    chunks = jnp.pad(experts, (0, -count % CHUNK), constant_values=num_experts).reshape(-1, CHUNK)
    hot = chunks[:, :, None] == jnp.arange(num_experts + 1, dtype=jnp.int32)
    histogram = _sum(hot, 1)  # [chunks, E + 1]
    base = _before(_sum(histogram, 0))[None] + _before(histogram)
    lane = jnp.arange(CHUNK)
    earlier = (chunks[:, None, :] == chunks[:, :, None]) & (lane[None, :] < lane[:, None])
    place = _sum(jnp.where(hot, base[:, None, :], 0), 2) + _sum(earlier, 2)
    return place.reshape(-1)[:count], _sum(histogram, 0)[:num_experts]
