"""The tables of grouping.py for few assignments in one launch: one program sorts, counts and cuts.

Launches are the cost in decoding: XLA would need six or more for the same. Entries after the last tile are not written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.grouped_matmul.grouping import Tiles, max_tiles

MOST = 256  # assignments; one multiprocessor compares all of them with each other
_CHUNK = 32


def group(experts: jax.Array, num_experts: int, tile_rows: int, interpret: bool = False) -> tuple[jax.Array, Tiles]:
    """As `grouping.group`, for at most MOST assignments int32 [A]: their order, and the tiles of the sorted rows."""
    count = experts.shape[0]
    lanes = max(_CHUNK, 1 << (count - 1).bit_length())
    buckets = max(_CHUNK, 1 << (num_experts - 1).bit_length())

    def kernel(experts_ref: Any, order_ref: Any, expert_ref: Any, start_ref: Any, rows_ref: Any, tiles_ref: Any) -> None:
        def keys(lane: Any) -> Any:  # by expert, then by place: all different
            return compat.triton_load(experts_ref.at[lane], mask=lane < count, other=num_experts) * lanes + lane

        lane, bucket = lax.iota(jnp.int32, lanes), lax.iota(jnp.int32, buckets)
        mine = keys(lane)

        def chunk(i: Any, carry: Any) -> Any:
            theirs = keys(i * _CHUNK + lax.iota(jnp.int32, _CHUNK))[None]
            bounds = mine, bucket * lanes, (bucket + 1) * lanes
            return [n + jnp.sum((theirs < bound[:, None]).astype(jnp.int32), 1) for n, bound in zip(carry, bounds, strict=True)]

        zeros = [jnp.zeros(n, jnp.int32) for n in (lanes, buckets, buckets)]
        place, start, end = lax.fori_loop(0, lanes // _CHUNK, chunk, zeros)
        compat.triton_store(order_ref.at[place], lane, mask=lane < count)

        sizes = jnp.where(bucket < num_experts, end - start, 0)
        counts = (sizes + tile_rows - 1) // tile_rows
        first = jnp.cumsum(counts) - counts
        tiles_ref[0] = jnp.sum(counts)

        def cut(i: Any, _: Any) -> None:
            for ref, values in (
                (expert_ref, bucket),
                (start_ref, start + i * tile_rows),
                (rows_ref, jnp.minimum(sizes - i * tile_rows, tile_rows)),
            ):
                compat.triton_store(ref.at[first + i], values, mask=i < counts)

        lax.fori_loop(0, jnp.max(counts), cut, None)

    shapes = [count, *[max_tiles(count, num_experts, tile_rows)] * 3, 1]
    order, expert, start, length, total = compat.triton_call(
        kernel,
        name="expert_grouping",
        grid=(1,),
        out_shape=[jax.ShapeDtypeStruct((n,), jnp.int32) for n in shapes],
        num_stages=1,
        interpret=interpret,
    )(experts)
    return order, Tiles(expert, start, length, total[0])
