"""Paged attention on NVIDIA GPUs (Triton lowering): one flash kernel, its context cut into ranges of fixed size.

A program has one KV head and the rows (token, query head of its group) of a tile of tokens of one sequence. It walks over KV
tiles of 64 positions (or 32), aligned to position 0, with the online softmax, and starts anew at every multiple of `SPLIT`
positions; the partial results are merged in order of position. For a tile of many tokens one program does this. For single
tokens that would be too few programs, so each range gets its own program, and a second kernel merges the results in the same
way. A sink is one more partial result, merged last: its score is the largest, its weight 1 and its output zero.

Positions are gathered through the page table one by one, so the page size does not matter. 8-bit elements are read as 16-bit
words with an even and an odd channel in each: channels are combined only in sums, so each half is a separate product.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.dispatch import Case, Target
from pallas_kernels.paged_attention import elements
from pallas_kernels.paged_attention.cache import KVCache

if TYPE_CHECKING:
    from pallas_kernels.paged_attention import AttentionMetadata, Sinks, Tables

SPLIT = 256  # positions per partial result
_MASKED = -1e30  # finite, so that a row before its first visible position never computes inf - inf
_NEVER = 2**31 - 1
_LOG2_E = 1.4426950408889634


def refuses(case: Case) -> str | None:
    """None if the kernel serves the case, else the reason."""
    if case.target.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {case.target}"
    _, _, _, q_heads, kv_heads, head_dim, _ = case.shape
    group, wide = q_heads // kv_heads, case.format != "float32"
    if head_dim % 2 or head_dim > (256 if wide else 128):
        return f"head_dim {head_dim}; with {case.format} even numbers up to {256 if wide else 128}"
    if group > (32 if wide else 16):
        return f"{group} query heads a KV head; with {case.format} {32 if wide else 16} at most"
    return None


class Work(NamedTuple):
    """Tiles of tokens, each int32 [5, count]: first token, the token after the last one, sequence (-1: no tile), the position
    of the first token, and the length of the sequence.

    single: tiles of one token. many: tiles of sequences with several tokens; None if single has all tokens. place int32
    [tokens], None without `many`: the index of a token in `single`, -1 for a token of `many`, and -2 for one without a
    sequence.
    """

    single: jax.Array
    many: jax.Array | None
    place: jax.Array | None


def prepare(tables: Tables, cache: KVCache, q_heads: int, window: int) -> Work:
    """Cuts the queries into tiles. The arguments are those of `make_metadata`."""
    tokens, sequences = tables.positions.shape[0], tables.kv_lengths.shape[0]
    starts = tables.query_starts
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1
    owner = jnp.where(token < starts[-1], owner, -1)

    def tiles(first: jax.Array, end: jax.Array, sequence: jax.Array) -> jax.Array:
        position, length = tables.positions[jnp.minimum(first, tokens - 1)], tables.kv_lengths[jnp.maximum(sequence, 0)]
        return jnp.stack([first, end, sequence, position, length]).astype(jnp.int32)

    if tokens <= sequences:
        return Work(tiles(token, token + 1, owner), None, None)
    alone = jnp.diff(starts) == 1
    single = tiles(starts[:-1], starts[1:], jnp.where(alone, jnp.arange(sequences), -1))
    size = _tokens_a_tile(cache, q_heads)
    count = jnp.where(alone, 0, -(-jnp.diff(starts) // size))
    ends = jnp.cumsum(count)
    tile = jnp.arange(min(tokens, tokens // size + sequences))
    sequence = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), sequences - 1)
    first = starts[sequence] + (tile - (ends - count)[sequence]) * size
    many = tiles(first, jnp.minimum(first + size, starts[sequence + 1]), jnp.where(tile < ends[-1], sequence, -1))
    place = jnp.where(owner < 0, -2, jnp.where(alone[owner], owner, -1))
    return Work(single, many, place)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"), inline=True)
def attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    metadata: AttentionMetadata,
    scale: float,
    sinks: Sinks = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """float32 [tokens, q_heads, head_dim]. See the package's contract."""
    work: Work = metadata.work
    told = metadata.tables, metadata.window, metadata.target, scale, interpret
    attend = functools.partial(_attend, q, cache, layer, sinks, *told)
    y = attend(work.single, 1)
    if work.many is None or work.place is None:
        return y
    rows = attend(work.many, _tokens_a_tile(cache, q.shape[1]))
    place = work.place[:, None, None]
    return jnp.where(place >= 0, y[jnp.maximum(work.place, 0)], jnp.where(place == -1, rows, 0.0))


def _attend(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    sinks: Sinks,
    tables: Tables,
    window: int,
    target: Target,
    scale: float,
    interpret: bool,
    tiles: Any,
    size: int,
) -> Any:
    """The results of the tiles' tokens: in the order of the tiles if size is 1, else in the order of the tokens."""
    q_heads, count = q.shape[1], tiles.shape[1]
    splits = math.ceil(tables.page_table.shape[1] * cache.page_size / SPLIT)
    partial = size == 1 and splits > 1
    group = q_heads // cache.kv_heads
    shape = cache.dtype, cache.head_dim, cache.page_size, group, size, window
    kernel = _Kernel(target, *shape, scale, sinks is not None, partial, interpret)
    last = [] if sinks is None else [sinks]  # operand of the kernel that finishes

    def results(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    out = [results(count if size == 1 else q.shape[0], q_heads, cache.head_dim)]
    stats = results(count, splits, q_heads)
    parts = compat.triton_call(
        kernel.attend,
        name="paged_attention_splits" if partial else "paged_attention",
        grid=(cache.kv_heads, splits if partial else 1, count),
        out_shape=[results(count, splits, q_heads, cache.head_dim), stats, stats] if partial else out,
        num_warps=4 if size == 1 and cache.dtype != "float32" else 8,
        num_stages=kernel.stages,
        interpret=interpret,
    )(tiles, tables.page_table, jnp.reshape(layer * cache.num_pages, (1,)), q, *_stored(cache), *([] if partial else last))
    if partial:
        parts = compat.triton_call(
            kernel.merge,
            name="paged_attention_merge",
            grid=(cache.kv_heads, 1, count),
            out_shape=out,
            num_warps=4,
            num_stages=2,
            interpret=interpret,
        )(tiles, *parts, *last)
    return parts[0]


def _stored(cache: KVCache) -> list[jax.Array]:
    """The cache as the kernel reads it: [rows, 2 * kv_heads, words], and the scales of int8 [rows * 2 * kv_heads]."""
    pages = cache.pages
    if pages.dtype.itemsize == 1:  # operands with one byte per element are addressed wrongly beyond 2 GiB
        pages = lax.bitcast_convert_type(pages.reshape(*pages.shape[:-1], -1, 2), jnp.uint16)
    elif pages.dtype != cache.dtype:
        pages = lax.bitcast_convert_type(pages, jnp.dtype(cache.dtype))
    pages = pages.reshape(-1, *pages.shape[3:])
    return [pages] if cache.scales is None else [pages, cache.scales.reshape(-1)]


def _tokens_a_tile(cache: KVCache, q_heads: int) -> int:
    """As many as keep a tile's rows (tokens x heads of the group) and its two results in registers."""
    rows = (64 if cache.dtype in ("bfloat16", "float16") else 32) * 128 // max(128, pl.next_power_of_2(cache.head_dim))
    return max(2, rows * cache.kv_heads // q_heads)


class _Kernel(NamedTuple):
    """The kernels for one KV dtype and shape: `group` query heads per KV head, `size` tokens per tile; `sinks`: whether there
    are any; `partial`: a program has one range of positions. Rows are (token, query head) pairs, `count` of them."""

    target: Target
    dtype: str
    head_dim: int
    page_size: int
    group: int
    size: int
    window: int
    scale: float
    sinks: bool
    partial: bool
    interpret: bool

    @property
    def kv_tile(self) -> int:
        """Positions of a KV tile, as many as a tile of rows leaves registers for. wgmma (9.0, 10.0) takes operands from shared
        memory, other GPUs keep them in registers; for 8.0, ptxas limits itself to 80 registers with 32 positions of float32 and
        spills."""
        if self.dtype == "float32" and self.target.capability == (8, 0):
            return 16
        return 64 if self.target.capability[0] in (9, 10) and self.dtype != "float32" and self.head_dim <= 128 else 32

    @property
    def stages(self) -> int:
        """Pipeline depth: a KV tile is loaded two stages after its entries of the page table, so 5 stages keep two tiles in
        shared memory and 3 keep one (GPUs with 99 KiB)."""
        return 3 if self.dtype == "float32" or self.target.capability in ((8, 6), (8, 9), (12, 0)) else 5

    # Elements. A word of storage has one or two elements; the first (or second) elements of all words form a plane.

    @property
    def planes(self) -> int:
        return 2 if self.dtype in ("int8", "float8_e4m3fn") else 1

    @property
    def unit(self) -> float:
        """The factor that operands lack."""
        return elements.E4M3_UNIT if self.dtype == "float8_e4m3fn" else 1.0

    def operands(self, words: jax.Array, of_int8: str) -> list[jax.Array]:
        """The planes of words [positions, columns]; int8 as integers in the dtype `of_int8`, e4m3 divided by `unit`."""
        if self.dtype == "int8":
            return elements.from_int8(words, of_int8, self.interpret)
        return elements.from_e4m3(words, self.interpret) if self.planes == 2 else [words]

    def queries(self, q: jax.Array, token: Any, head: Any, live: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The planes of q's rows as operands, and the factor of their products for exp2, [rows, 1]."""
        rows = [self.load(q, (token, head), live, plane) for plane in range(self.planes)]
        if self.dtype in ("float32", "bfloat16"):
            return [row.astype(self.dtype) for row in rows], jnp.full((len(token), 1), self.scale * _LOG2_E)
        # float16 has a narrow range: divide the row by the power of two below its largest, exactly.
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(row), axis=1, keepdims=True) for row in rows])
        exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
        inverse = lax.bitcast_convert_type(0x7F000000 - exponent, jnp.float32)
        power = lax.bitcast_convert_type(exponent, jnp.float32)
        return [(row * inverse).astype(jnp.float16) for row in rows], power * (self.scale * _LOG2_E * self.unit)

    # Memory

    @property
    def columns(self) -> int:
        """Channels of a plane, rounded up to a power of two."""
        return pl.next_power_of_2(self.head_dim // self.planes)

    def part(self, array: Any, index: tuple, mask: Any, plane: int | None) -> Any:
        """array[*index, :] with indices [rows], all words or the channels of a plane, and which of its elements exist."""
        column, used = lax.iota(jnp.int32, self.columns), self.head_dim // self.planes
        channel = column if plane is None else column * self.planes + plane
        there = mask[:, None] if self.columns == used else mask[:, None] & (column < used)
        return array.at[*(i[:, None] for i in index), channel[None]], there

    def load(self, array: Any, index: tuple, mask: Any, plane: int | None = None) -> jax.Array:
        """[rows, columns], zero where not `mask` [rows]."""
        part, there = self.part(array, index, mask, plane)
        return compat.triton_load(part, mask=there, other=jnp.zeros((), array.dtype))

    def store(self, array: Any, planes: Any, index: tuple, mask: Any) -> None:
        for plane, values in enumerate(planes):
            part, there = self.part(array, index, mask, plane)
            compat.triton_store(part, values, mask=there)

    # Partial results: the largest score of each row, the sum of its weights relative to it, and the planes of its output

    def nothing(self, rows: int) -> Any:
        """The partial result of no positions."""
        outs = [jnp.zeros((rows, self.columns), jnp.float32) for _ in range(self.planes)]
        return jnp.full((rows,), _MASKED), jnp.zeros((rows,), jnp.float32), outs

    def finish(self, result: Any, sinks: Any, head: jax.Array, mask: jax.Array) -> list[jax.Array]:
        """The planes of the output of rows of these heads; sinks: those of all heads, or None."""
        if sinks is not None:
            sink = compat.triton_load(sinks.at[head], mask=mask, other=_MASKED) * _LOG2_E
            result = _merged(result, (sink, jnp.ones_like(sink), [jnp.zeros_like(out) for out in result[2]]))
        _, total, outs = result
        factor = self.unit / jnp.where(total == 0.0, 1.0, total)
        return [out * factor[:, None] for out in outs]

    # Kernels

    def seen(self, tiles: Any, offset: Any) -> Any:
        """The tokens at offsets [rows] of this program's tile, which of them exist, and the positions that each sees, from low
        (0 without a window) to high."""
        first, end, sequence, position, length = (tiles[i, pl.program_id(2)] for i in range(5))
        token, until = first + offset, position + offset + 1
        live = (offset < self.size) & (token < end) & (sequence >= 0)
        low = jnp.where(live, jnp.maximum(until - self.window, 0), _NEVER) if self.window else jnp.zeros_like(until)
        return token, live, low, jnp.where(live, jnp.minimum(until, length), 0)

    def attend(self, tiles: Any, table: Any, first_page: Any, q: jax.Array, pages: Any, *rest: Any) -> None:
        """Grid (kv_heads, splits or 1, tiles)."""
        scales, rest = (rest[0], rest[1:]) if self.dtype == "int8" else (None, rest)
        sinks, outputs = (rest[0], rest[1:]) if self.sinks and not self.partial else (None, rest)
        kv_head, part, tile = (pl.program_id(axis) for axis in range(3))
        count = max(16, pl.next_power_of_2(self.size * self.group))
        row = lax.iota(jnp.int32, count)
        offset, head = row // self.group, kv_head * self.group + row % self.group
        token, live, low, high = self.seen(tiles, offset)
        near, far = (jnp.min(low) if self.window else 0), jnp.max(high)
        queries, factor = self.queries(q, token, head, live)
        sequence = jnp.maximum(tiles[2, tile], 0)

        def step(i: Any, carry: Any) -> Any:
            best, total, outs = carry
            position = i * self.kv_tile + lax.iota(jnp.int32, self.kv_tile)
            inside = position < far
            visible = position[None] < high[:, None]
            if self.window:
                inside &= position >= near
                visible &= position[None] >= low[:, None]
            page = compat.triton_load(table.at[sequence, position // self.page_size], mask=inside, other=0)
            place = (first_page[0] + page) * self.page_size + position % self.page_size
            there = jnp.full((self.kv_tile,), 2 * kv_head)
            keys = self.operands(self.load(pages, (place, there), inside), "float16")
            # The weights of int8 values include their scales and may have any magnitude.
            values = self.operands(self.load(pages, (place, there + 1), inside), "bfloat16")
            scores = functools.reduce(jnp.add, [_dot(q, k, 1) for q, k in zip(queries, keys, strict=True)]) * factor
            if scales is not None:
                scale = place * pages.shape[1] + there
                scores *= compat.triton_load(scales.at[scale], mask=inside, other=0.0)[None]
            scores = jnp.where(visible, scores, _MASKED)
            new = jnp.maximum(best, jnp.max(scores, axis=1))
            weights = jnp.where(visible, jnp.exp2(scores - new[:, None]), 0.0)
            keep = jnp.exp2(best - new)
            total = total * keep + jnp.sum(weights, axis=1)
            if scales is not None:
                weights *= compat.triton_load(scales.at[scale + 1], mask=inside, other=0.0)[None]
            outs = [out * keep[:, None] + _dot(weights.astype(v.dtype), v, 0) for out, v in zip(outs, values, strict=True)]
            return new, total, outs

        def walk(i: Any) -> Any:
            """The partial result of range i."""
            first = jnp.maximum(i * (SPLIT // self.kv_tile), near // self.kv_tile)
            last = pl.cdiv(jnp.minimum((i + 1) * SPLIT, far), self.kv_tile)
            return lax.fori_loop(first, last, step, self.nothing(count))

        if self.partial:

            @pl.when((part * SPLIT < far) & ((part + 1) * SPLIT > near))
            def _() -> None:
                best, total, outs = walk(part)
                index = (tile + offset, jnp.full((count,), part), head)
                self.store(outputs[0], outs, index, live)
                for stat, values in zip(outputs[1:], (best, total), strict=True):
                    compat.triton_store(stat.at[index], values, mask=live)

        else:
            ranges = (near // SPLIT, pl.cdiv(far, SPLIT))
            result = lax.fori_loop(*ranges, lambda i, so_far: _merged(so_far, walk(i)), self.nothing(count))
            result = self.finish(result, sinks, head, offset < self.size)
            if self.size == 1:  # every tile is a row of the result, zero if it has no token
                self.store(outputs[0], result, (tile + offset, head), offset == 0)
            else:
                self.store(outputs[0], result, (token, head), live)

    def merge(self, tiles: Any, outs: Any, bests: Any, totals: Any, *rest: Any) -> None:
        """Grid (kv_heads, 1, tiles): the partial results of a token, in order of position."""
        *sinks, out = rest
        kv_head, tile = pl.program_id(0), pl.program_id(2)
        count = pl.next_power_of_2(self.group)
        row = lax.iota(jnp.int32, count)
        head, used = kv_head * self.group + row, row < self.group
        _, _, low, high = self.seen(tiles, jnp.zeros((count,), jnp.int32))
        first, last = (jnp.min(low) // SPLIT if self.window else 0), pl.cdiv(jnp.max(high), SPLIT)
        together = 4  # loads in flight

        def step(i: Any, result: Any) -> Any:
            for part in (first + i * together + k for k in range(together)):
                there = used & (part < last)
                index = (jnp.full((count,), tile), jnp.full((count,), part), head)
                best = compat.triton_load(bests.at[index], mask=there, other=_MASKED)
                total = compat.triton_load(totals.at[index], mask=there, other=0.0)
                planes = [self.load(outs, index, there, plane) for plane in range(self.planes)]
                result = _merged(result, (best, total, planes))
            return result

        result = lax.fori_loop(0, pl.cdiv(last - first, together), step, self.nothing(count))
        result = self.finish(result, sinks[0] if sinks else None, head, used)
        self.store(out, result, (jnp.full((count,), tile), head), used)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """a [m, k] times b, whose axis `contract` is k: float32."""
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _merged(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two partial results as one; the first is of earlier positions."""
    best = jnp.maximum(a[0], b[0])
    of_a, of_b = jnp.exp2(a[0] - best), jnp.exp2(b[0] - best)
    outs = [x * of_a[:, None] + y * of_b[:, None] for x, y in zip(a[2], b[2], strict=True)]
    return best, a[1] * of_a + b[1] * of_b, outs
