"""The tables of `grouping.group` for few assignments, in one small TPU kernel instead of a dozen XLA fusions.

At batch 1 those fusions would take as long as the experts themselves. Experts are on the sublanes, assignments and tiles on the
lanes; counts are sums of comparisons, and sums along the lanes are products with 0/1 matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.grouping import max_tiles

MOST = 1024  # assignments


class Work(NamedTuple):
    """As the fields of the same names in `grouping.Groups`, int32 [1, any] each and longer than needed."""

    order: jax.Array
    tile_expert: jax.Array
    tile_start: jax.Array
    tile_rows: jax.Array
    num_tiles: jax.Array  # scalar; 1 if no token is routed: a tile without rows


def group_few(experts: jax.Array, num_experts: int, tile_rows: int, interpret: bool = False) -> Work:
    """Assignments `experts` int32 [at most MOST], sorted by expert and cut into tiles; the id `num_experts` means no expert."""
    count = experts.shape[0]
    lanes = -(-count // 128) * 128
    sublanes = -(-(num_experts + 1) // 8) * 8  # "no expert" comes after the experts
    tiles = -(-max_tiles(count, num_experts, tile_rows) // 128) * 128
    ids = jnp.pad(experts, (0, lanes - count), constant_values=num_experts)[None]

    def kernel(ids: Any, order: Any, tile_expert: Any, tile_start: Any, rows_of_tile: Any, num_tiles: Any) -> None:
        expert = _iota((sublanes, lanes), 0)
        mine = (ids[...] == expert).astype(jnp.float32)
        size = jnp.sum(mine, 1, keepdims=True)  # [experts, 1]
        start = jnp.sum((ids[...] < expert).astype(jnp.float32), 1, keepdims=True)
        earlier = _iota((lanes, lanes), 0) < _iota((lanes, lanes), 1)
        rank = jnp.dot(mine.astype(jnp.bfloat16), earlier.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        where = jnp.sum(mine * (start + rank), 0, keepdims=True)  # [1, assignments]

        here = (where.astype(jnp.int32) == _iota((lanes, lanes), 0)).astype(jnp.bfloat16)  # [places, assignments]
        which = _iota((8, lanes), 1)
        high, low = (  # both parts are exact in bfloat16
            lax.dot_general(part.astype(jnp.bfloat16), here, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            for part in (which >> 5, which & 31)
        )
        order[...] = (high * 32 + low).astype(jnp.int32)[:1]

        kept = jnp.where(_iota((sublanes, 1), 0) < num_experts, size, 0.0).astype(jnp.int32)
        tiles_of = (kept + (tile_rows - 1)) // tile_rows
        before = _iota((sublanes, sublanes), 1) < _iota((sublanes, sublanes), 0)
        spread = jnp.broadcast_to(tiles_of.astype(jnp.float32), (sublanes, 128)).astype(jnp.bfloat16)
        first = jnp.dot(before.astype(jnp.bfloat16), spread, preferred_element_type=jnp.float32)[:, :1].astype(jnp.int32)
        total = jnp.maximum(jnp.sum(tiles_of.astype(jnp.float32)).astype(jnp.int32), 1)
        num_tiles[0, 0] = total

        tile = jnp.minimum(_iota((sublanes, tiles), 1), total - 1) - first  # of each expert
        owned = (tile >= 0) & (tile < tiles_of)

        def of_owner(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(owned, values, 0).astype(jnp.float32), 0, keepdims=True).astype(jnp.int32)

        tile_expert[...] = of_owner(_iota((sublanes, tiles), 0))
        tile_start[...] = of_owner(start.astype(jnp.int32) + tile * tile_rows)
        rows = of_owner(jnp.minimum(kept - tile * tile_rows, tile_rows))
        rows_of_tile[...] = jnp.where(_iota((1, tiles), 1) < total, rows, 0)

    def table(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    vector, scalar = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.SMEM)
    order, tile_expert, tile_start, rows_of_tile, num_tiles = pl.pallas_call(
        kernel,
        out_shape=[table(1, lanes)] + [table(1, tiles)] * 3 + [table(1, 1)],
        in_specs=[vector],
        out_specs=[vector] * 4 + [scalar],
        cost_estimate=pl.CostEstimate(
            flops=2 * lanes * lanes * (sublanes + 16), transcendentals=0, bytes_accessed=4 * (2 * lanes + 3 * tiles)
        ),
        name="group_few",
        interpret=interpret,
    )(ids)
    return Work(order, tile_expert, tile_start, rows_of_tile, num_tiles[0, 0])


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
