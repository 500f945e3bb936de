"""Kernels in C++ for CPUs, called from inside compiled programs (XLA FFI): unpacked weights are never written to memory.

Activations are float32 in memory; inside a product they are quantized to int8 in blocks of 32 ("int8" arithmetic). A row's
result depends neither on the other rows nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.blocks import format_of
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.native import build
from pallas_kernels.native.build import isa, prepare, refusal
from pallas_kernels.native.tables import FORMATS, MATRICES, ROLES
from pallas_kernels.routing.parts import Router

if TYPE_CHECKING:
    from pallas_kernels.decoder_layers.parts import Attending, LayerShape, Part, Recurring, Stack
    from pallas_kernels.delta_net.parts import DeltaState, Sequences
    from pallas_kernels.delta_net.parts import Operands as DeltaOperands
    from pallas_kernels.grouped_matmul.parts import Biases, Clamp
    from pallas_kernels.paged_attention import KVCache, Tables

__all__ = [
    "FORMATS",
    "decoder_layers",
    "delta_net",
    "expert_ffn",
    "isa",
    "matmul_by_head",
    "matmuls",
    "matmuls_twice",
    "prepare",
    "refusal",
    "refuses",
    "swiglu",
]


def refuses(case: dispatch.Case) -> str | None:
    """Why the kernels do not serve a case; None if they do."""
    if case.target.platform != "cpu":
        return "is for CPUs"
    if case.operation == "delta_net":
        *_, key_dim, value_dim, _ = case.shape
        return "has heads of 16n keys and values" if key_dim % 16 or value_dim % 16 else build.refusal()
    if case.dtype not in ("int8", "int8x2"):
        return f"is for int8 arithmetic, not {case.dtype}"
    if case.format not in FORMATS:
        return f"has no kernel for {case.format}"
    if case.memory_layout != "ggml":
        return f"reads blocks as files have them, not memory layout {case.memory_layout}"
    if case.dtype == "int8x2" and case.operation not in ("quantized_matmul", "matmul_by_head"):
        return "has int8x2 for single products alone"
    if case.operation == "grouped_matmul":
        return "serves whole mixtures of experts"
    if case.operation == "decoder_layers":
        hidden, head_dim, kinds = case.shape
        if kinds > 1:
            return f"has whole layers of one head width and one choice of experts; these are of {kinds} kinds"
        if hidden % 32 or head_dim % 16:
            return "has whole layers of 32n values with heads of 16n"
    return build.refusal()


def matmuls(x: jax.Array, matrices: Sequence[Matrix], target: dispatch.Target) -> list[jax.Array]:
    """x float32 [m, k] times each transposed matrix [n_i, k]: float32 [m, n_i]."""
    return _call("ferrum_matmuls", [matrix.rows for matrix in matrices], matrices, "int8", x)


def matmuls_twice(x: jax.Array, matrices: Sequence[Matrix], target: dispatch.Target) -> list[jax.Array]:
    """`matmuls` in which the error of quantizing x is quantized and multiplied, too: "int8x2"."""
    return _call("ferrum_matmuls", [matrix.rows for matrix in matrices], matrices, "int8x2", x)


def matmul_by_head(x: jax.Array, heads: Matrix, target: dispatch.Target) -> jax.Array:
    """x float32 [tokens, heads, k] times each head's transposed matrix, as `matmuls_twice`: float32 [tokens, heads, n]."""
    inputs = x.swapaxes(0, 1), jnp.arange(x.shape[1], dtype=jnp.int32)
    return jax.lax.map(lambda each: matmuls_twice(each[0], (heads.at(each[1]),), target)[0], inputs).swapaxes(0, 1)


def swiglu(x: jax.Array, gate: Matrix, up: Matrix, target: dispatch.Target) -> jax.Array:
    """silu(x · gateᵀ) * (x · upᵀ): float32 [m, n]."""
    return _call("ferrum_swiglu", [gate.rows], (gate, up), "int8", x)[0]


def expert_ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    target: dispatch.Target,
    biases: Biases | None = None,
    clamp: Clamp | None = None,
) -> jax.Array:
    """The mixture of experts of grouped_matmul: float32 [tokens, k]."""
    matrices, added = (gate, up, down), tuple(biases or ())
    return _call("ferrum_experts", [down.rows], matrices, "int8", x, expert_ids, expert_weights, last=added, **_of(clamp))[0]


def decoder_layers(
    x: jax.Array,
    caches: Sequence[KVCache],
    kv_slots: Sequence[jax.Array],
    tables: Sequence[Tables],
    ropes: Sequence[tuple[jax.Array, jax.Array]],
    states: Sequence[DeltaState],
    sequences: Sequences | None,
    stacks: Sequence[Stack],
    layers: Sequence[Mapping[str, Part]],
    mixers: Sequence[Attending | Recurring],
    shape: LayerShape,
    record: bool,
) -> tuple[jax.Array, tuple[KVCache, ...], tuple[DeltaState, ...], tuple[jax.Array, ...]]:
    """See the contract of pallas_kernels.decoder_layers."""
    places = np.full((len(layers), len(ROLES), 2), -1, np.int64)
    for places_of, layer in zip(places, layers, strict=True):
        for role, part in layer.items():
            places_of[ROLES.index(role)] = part
    vectors = {part.stack for layer in layers for role, part in layer.items() if role not in MATRICES}
    arrays = [format_of(s.format).decode(s.array) if number in vectors else s.array for number, s in enumerate(stacks)]
    kept, structure = jax.tree.flatten((tuple(caches), tuple(states)))
    angles = (part.reshape(x.shape[0], -1) for rope in ropes for part in rope)
    pools = (array for slots, table in zip(kv_slots, tables, strict=True) for array in (slots, table.page_table))
    places_of_states = (sequences.begins, sequences.reads, sequences.writes) if sequences else ()
    step = x, tables[0].positions, tables[0].query_starts, tables[0].kv_lengths
    operands = (*step, *angles, *pools, *places_of_states, *arrays)
    router = shape.router or Router(0)
    routed = sum("router" in layer for layer in layers), x.shape[0], router.top_k
    recorded = [jax.ShapeDtypeStruct(routed, dtype) for dtype in (jnp.int32, jnp.float32)] if record else []
    y, *results = jax.ffi.ffi_call(
        "ferrum_layers",
        [*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *kept)), *recorded],
        input_output_aliases={len(operands) + i: 1 + i for i in range(len(kept))},
    )(
        *operands,
        *kept,
        places=places.reshape(-1),
        formats=",".join(stack.format for stack in stacks),
        mixers=np.asarray([(*mixer, 0)[:4] for mixer in mixers], np.int64).reshape(-1),
        pools=np.int64(len(caches)),
        states=np.int64(len(states)),
        ropes=np.int64(len(ropes)),
        kv_dtype=caches[0].dtype,
        top_k=np.int64(router.top_k),
        groups=np.int64(router.groups),
        groups_used=np.int64(router.groups_used),
        group_best=np.int64(router.group_best),
        eps=np.float32(shape.eps),
        scale=np.float32(shape.head_dim**-0.5),
        expert_scale=np.float32(router.scale),
        expert_eps=np.float32(router.eps),
        normalize=router.normalize,
        sigmoid=router.scoring == "sigmoid",
        gated=shape.gated,
        **_of(shape.clamp),
    )
    return y, *jax.tree.unflatten(structure, results[: len(kept)]), tuple(results[len(kept) :])


def delta_net(operands: DeltaOperands, tiled: bool) -> tuple[jax.Array, DeltaState]:
    """As the contract of pallas_kernels.delta_net says."""
    qkv, log_decay, beta, taps, state, layer, sequences = operands
    result = jax.ShapeDtypeStruct((qkv.shape[0], state.memory.shape[2], state.memory.shape[4]), jnp.float32)
    kept = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in state]
    tables = sequences.starts, sequences.begins, sequences.reads, sequences.writes
    call = jax.ffi.ffi_call("ferrum_delta_net", [result, *kept], input_output_aliases={9: 1, 10: 2})
    out, tail, memory = call(qkv, log_decay, beta, taps, jnp.asarray(layer, jnp.int32), *tables, *state, tiled=tiled)
    return out, state._replace(tail=tail, memory=memory)


def _of(clamp: Clamp | None) -> dict[str, np.float32]:
    """The attributes that say it; a limit of 0: there is none."""
    limit, alpha = clamp or (0.0, 0.0)
    return {"limit": np.float32(limit), "alpha": np.float32(alpha)}


def _call(
    name: str,
    widths: list[int],
    matrices: Sequence[Matrix],
    arithmetic: str,
    x: jax.Array,
    *more: jax.Array,
    last: Sequence[jax.Array] = (),
    **attributes: np.float32,
) -> list[jax.Array]:
    """One call of a kernel: results float32 [rows of x, width]. Operands are x, more, the matrices, last."""
    results = [jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32) for width in widths]
    operands = [part for matrix in matrices for part in (_place(matrix), matrix.planes[0])]
    formats = ",".join(matrix.format for matrix in matrices)
    call = jax.ffi.ffi_call(name, results)
    return list(call(x, *more, *operands, *last, formats=formats, arithmetic=arithmetic, **attributes))


def _place(matrix: Matrix) -> jax.Array:
    """The number of the matrix in the flattened stack: int32 []. Axes without an index are not counted."""
    place: jax.Array = jnp.zeros((), jnp.int32)
    for size, index in zip(matrix.planes[0].shape, matrix.index, strict=False):
        place = place * size + index
    return place
