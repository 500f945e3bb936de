"""Packed matrices: they are read bit for bit as by an independent unpacker in NumPy, and matrices whose columns are in another
order give the products of ordinary ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.distributed import Placement
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.safetensors import ITEM_BYTES
from ferrum_jax.weights.stream import read_parameters
from pallas_kernels import grouped_matmul, quantized_matmul
from pallas_kernels.blocks import FORMATS, GROUPS, format_of, unpack
from pallas_kernels.blocks.layouts import gather_rows, unpack_rows
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.dispatch import Target
from support.directories import LLAMA, MOE, Packing, edit_tensors, write
from support.goldens import tiny_directories
from support.random_models import stored

DOWN = "model.layers.0.mlp.down_proj"
PACKINGS = {
    "gptq": (Packing("gptq", 4, 32), "Q4_0"),
    "gptq-64": (Packing("gptq", 4, 64, own_file=True), "Q4_0"),
    "gptq-row": (Packing("gptq_v2", 4, -1), "Q4_0"),
    "gptq-asym": (Packing("gptq", 4, 128, symmetric=False), "U4_128_F16"),
    "gptq_v2-asym-96": (Packing("gptq_v2", 4, 96, symmetric=False), "U4_32_F16"),
    "gptq-asym-ordered": (Packing("gptq", 4, 64, symmetric=False, ordered=True), "U4_64_F16"),
    "gptq-ordered-bf16": (Packing("gptq", 4, 32, ordered=True, scales="BF16"), "Q4_0"),
    "gptq8": (Packing("gptq", 8, 32), "Q8_0"),
    "gptq8-asym": (Packing("gptq", 8, 64, symmetric=False), "U8_64_F16"),
    "gptq8_v2-asym-f32": (Packing("gptq_v2", 8, -1, symmetric=False, scales="F32"), "U8_128_F32"),
    "awq": (Packing("awq", 4, 64, symmetric=False), "U4_64_F16"),
    "awq-symmetric": (Packing("awq", 4, 128), "Q4_0"),
    "awq-row": (Packing("awq", 4, -1, symmetric=False), "U4_128_F16"),
    "compressed": (Packing("compressed-tensors", 4, 128, scales="BF16"), "Q4_0"),
    "compressed-f32": (Packing("compressed-tensors", 4, 32, scales="F32"), "U4_32_F32"),
    "compressed-asym": (Packing("compressed-tensors", 4, 64, symmetric=False, scales="BF16"), "U4_64_BF16"),
    "compressed-ordered": (Packing("compressed-tensors", 4, 32, symmetric=False, ordered=True), "U4_32_F16"),
    "compressed8-channel": (Packing("compressed-tensors", 8, -1, symmetric=False, scales="BF16"), "U8_128_BF16"),
}


def unpacked(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], packing: Packing) -> np.ndarray:
    """float32 [rows, columns] by the definition of each format, one number at a time along the packed axis."""
    kinds = {"I32": "<i4", "I64": "<i8"}
    arrays = {}
    for name, (dtype, shape, data) in tensors.items():
        flat = np.frombuffer(data, kinds[dtype]) if dtype in kinds else tiny_directories.from_bytes(data, dtype)
        arrays[name] = flat.reshape(shape)
    bits, each = packing.bits, 32 // packing.bits

    def spread(words: np.ndarray, axis: int, places: list[int]) -> np.ndarray:
        """Number i of a word is at the place places[i] within it."""
        parts = [(words.astype(np.int64) >> (bits * place)) & ((1 << bits) - 1) for place in places]
        grown = np.stack(parts, axis=axis + 1)
        return grown.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])

    plain = list(range(each))
    if packing.method == "compressed-tensors":
        rows, columns = arrays["weight_shape"]
        codes, scales = spread(arrays["weight_packed"], 1, plain), arrays["weight_scale"]
        middle = np.full(scales.shape, 1 << (bits - 1))
        zeros = spread(arrays["weight_zero_point"], 0, plain)[:rows] if "weight_zero_point" in arrays else middle
        assert codes.shape == (rows, columns)
        group = arrays.get("weight_g_idx")
    elif packing.method == "awq":
        places = [0, 4, 1, 5, 2, 6, 3, 7]
        codes, zeros = spread(arrays["qweight"], 1, places).T, spread(arrays["qzeros"], 1, places).T
        scales, group = arrays["scales"].T, None
    else:
        codes, zeros = spread(arrays["qweight"], 0, plain).T, spread(arrays["qzeros"], 1, plain).T
        zeros = zeros + (1 if packing.method == "gptq" else 0)
        scales, group = arrays["scales"].T, arrays["g_idx"]
    if group is None:
        group = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return scales[:, group].astype(np.float32) * (codes - zeros[:, group]).astype(np.float32)


@pytest.mark.parametrize("name", PACKINGS)
def test_matrices_are_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    packing, format = PACKINGS[name]
    path = write(dataclasses.replace(LLAMA, hidden=384, heads=12, ff=768, packing=packing), tmp_path / "model")
    raw: dict = {}
    edit_tensors(path / "model.safetensors", lambda t: raw.update(t))
    expected = unpacked({n.rpartition(".")[2]: t for n, t in raw.items() if n.startswith(DOWN)}, packing)
    with open_model(path) as model:
        info = model.tensors["blk.0.ffn_down.weight"]
        assert info.format == format and info.shape == expected.shape and info.name.startswith(DOWN)
        known = format_of(format)
        assert info.nbytes == expected.shape[0] * known.row_bytes(expected.shape[1])
        blocks = model.read(info)
        made = np.asarray(unpack(blocks.reshape(expected.shape[0], -1), format))
        assert (info.order is not None) == packing.ordered
        if info.order is not None:
            order = model.read(info.order).view(np.int32)
            assert info.order.shape == (768,) and sorted(order) == list(range(768))
            expected = expected[:, order]
        assert (made.view(np.uint32) == expected.view(np.uint32)).all()
        part = np.empty(1000, np.uint8)
        model.read_into(info, part, 123)
        assert (part == blocks[123:1123]).all()


def test_packed_weights_stay_packed(tmp_path: Path) -> None:
    """Parameters take at most 1.05 of the file's bytes, but for Q4_0's scales of every 32 weights (4.5 bits for 4.16)."""
    cases = (Packing("awq", 4, 128, symmetric=False), 1.05), (Packing("gptq", 8, 128), 1.05), (Packing("gptq", 4, 128), 1.09)
    for packing, most in cases:
        spec = dataclasses.replace(LLAMA, dtype="F16", hidden=512, heads=16, ff=1024, packing=packing)
        path = write(spec, tmp_path / f"{packing.method}{packing.bits}")
        with open_model(path) as model:
            ours = sum(info.nbytes for info in model.tensors.values() if len(info.shape) > 1)
        sizes: dict = {}
        edit_tensors(path / "model.safetensors", lambda t, sizes=sizes: sizes.update(t))
        assert ours <= most * sum(len(data) for _, _, data in sizes.values())


def test_what_a_file_says_counts_less_than_what_it_holds(tmp_path: Path) -> None:
    """A file that claims to be symmetric but has other zero points, or desc_act without an order, is read as stored."""
    spec = dataclasses.replace(LLAMA, packing=Packing("gptq", 4, 32, symmetric=False))
    path = write(spec, tmp_path / "model")
    keys = {"sym": True, "desc_act": True, "quant_method": "gptq", "bits": 4, "group_size": 32}
    write(spec, path, {"quantization_config": keys})
    with open_model(path) as model:
        info = model.tensors["blk.0.attn_q.weight"]
        assert (info.format, info.order) == ("U4_32_F16", None)


def test_experts_agree_in_one_format(tmp_path: Path) -> None:
    """One expert with other zero points: the whole stack has the format that holds all of them."""
    path = write(dataclasses.replace(MOE, packing=Packing("gptq", 4, 32)), tmp_path / "moe")
    name = "model.layers.0.mlp.experts.3.up_proj.qzeros"
    edit_tensors(path / "model.safetensors", lambda t: t.update({name: (*t[name][:2], b"\x66" + t[name][2][1:])}))
    with open_model(path) as model:
        assert model.tensors["blk.0.ffn_up_exps.weight"].format == "U4_32_F16"
        assert model.tensors["blk.0.ffn_gate_exps.weight"].format == "Q4_0"
        made = np.asarray(unpack(model.read(model.tensors["blk.0.ffn_up_exps.weight"]).reshape(4, 32, -1), "U4_32_F16"))
    dense = dict(tiny_directories.dense(dataclasses.replace(MOE, packing=Packing("gptq", 4, 32))))
    for e in range(3):
        assert (made[e] == dense[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]).all()
    assert (made[3] != dense["model.layers.0.mlp.experts.3.up_proj.weight"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-ordered-bf16", "gptq-asym-ordered", "awq", "compressed-ordered"])
def test_faster_arithmetic(name: str, tmp_path: Path) -> None:
    """The choice of "auto", ordinary kernels after reordering columns, and bfloat16: close to float32's logits."""
    packing = dataclasses.replace(PACKINGS[name][0], group_size=32)
    path = write(dataclasses.replace(MOE, packing=packing), tmp_path / "model")
    exact, fast, half = (fj.load(path, dtype=dtype).logits([[5, 6, 7, 8]])[0] for dtype in ("float32", "auto", "bfloat16"))
    assert np.abs(exact - fast).max() <= 0.1 * exact.std() and np.abs(exact - half).max() <= 0.3 * exact.std()


# Formats


@pytest.mark.parametrize("name", GROUPS)
def test_groups_decode(name: str) -> None:
    """Random bytes, alone and inside a program, against the layout written down in the module's head."""
    known = GROUPS[name]
    _, bits, size, scale = name[0], int(name[1]), known.block_size, name.rpartition("_")[2]
    rng = np.random.default_rng(size + bits)
    raw = rng.integers(0, 256, (8, known.row_bytes(4 * size)), dtype=np.uint8)
    blocks = raw.reshape(8, 4, known.block_bytes)
    width = ITEM_BYTES[scale]
    blocks[..., width - 1] = rng.choice([0x2C, 0x3D, 0xBB], (8, 4))  # finite, and no product is subnormal
    d = tiny_directories.from_bytes(blocks[..., :width].tobytes(), scale).reshape(8, 4, 1)
    z = blocks[..., width : width + bits // 4].copy().view(f"<u{bits // 4}").astype(np.int32)
    q = blocks[..., width + bits // 4 :].astype(np.int32)
    if bits == 4:
        runs = q.reshape(8, 4, -1, 1, 16)
        q = np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(8, 4, -1)
    expected = (d * (q - z).astype(np.float32)).reshape(8, -1)
    assert q.shape[-1] == size and name not in FORMATS
    for made in (unpack(raw, name), jax.jit(lambda x: unpack(x, name) * np.float32(1))(raw)):
        assert (np.asarray(made).view(np.uint32) == expected.view(np.uint32)).all()


def ordered(format: str, experts: int, rows: int, columns: int, seed: int) -> tuple[Matrix, Matrix]:
    """Experts with their columns in other orders, and the same as float32 in the order of the matrix."""
    rng = np.random.default_rng(seed)
    blocks = jnp.asarray(stored(format, (experts, rows, columns), rng, columns**-0.5)) if format in FORMATS else None
    if blocks is None:
        raw = rng.integers(0, 256, (experts, rows, columns // 64, format_of(format).block_bytes), dtype=np.uint8)
        raw[..., 1], raw[..., 2] = 0x18, rng.integers(0, 16, raw.shape[:-1])
        blocks = jnp.asarray(raw.reshape(experts, rows, -1))
    order = np.stack([rng.permutation(columns) for _ in range(experts)]).astype(np.int32)
    dense = np.empty((experts, rows, columns), np.float32)
    for e in range(experts):
        dense[e][:, order[e]] = np.asarray(format_of(format).decode(blocks[e]))
    plain = Matrix.of(jnp.asarray(dense), "F32")
    return Matrix((blocks, jnp.asarray(order)), (), format, "ggml+order", rows, columns), plain


@pytest.mark.slow
@pytest.mark.parametrize("format", ["Q4_0", "U4_64_F16"])
def test_ordered_products(format: str) -> None:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((9, 128)).astype(np.float32))
    pairs = [ordered(format, 5, 64, 128, seed) for seed in (1, 2)]
    gate, plain_gate = pairs[0]
    down, plain_down = ordered(format, 5, 128, 64, 4)
    sizes = jnp.asarray([2, 0, 3, 3, 0], jnp.int32)  # one row has no expert
    experts = jnp.asarray(rng.integers(0, 6, (9, 2)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (9, 2)).astype(np.float32))

    def close(function, *matrices) -> None:
        """The products and their derivatives agree."""

        def both(*chosen: Matrix) -> tuple[jax.Array, jax.Array]:
            return function(x, *chosen), jax.grad(lambda x: jnp.sum(function(x, *chosen) ** 2))(x)

        for one, other in zip(*(both(*chosen) for chosen in zip(*matrices, strict=True)), strict=True):
            assert np.abs(one - other).max() <= 1e-5 * max(1.0, float(np.abs(other).max()))

    close(lambda x, m: quantized_matmul.quantized_matmul(x, m.at(2)), pairs[0])
    close(lambda x, m: quantized_matmul.quantized_matmuls(x, [m.at(1), m.at(4)])[1], pairs[0])
    close(lambda x, g, u: quantized_matmul.swiglu(x, g.at(0), u.at(3)), *pairs)
    close(lambda x, m: grouped_matmul.grouped_matmul(x, sizes, m), pairs[1])
    close(lambda x, g, u, d: grouped_matmul.expert_ffn(x, experts, weights, g, u, d), *pairs, (down, plain_down))
    ids = jnp.asarray([3, 0, 63, 3])
    one, other = gate.at(2), plain_gate.at(2)
    exact = np.asarray(unpack_rows(other, 0, 64))
    assert (np.asarray(unpack_rows(one, 8, 16)) == exact[8:24]).all()
    alone = Matrix((gate.planes[0][2], gate.planes[1][2]), (), format, "ggml+order", 64, 128)
    assert (np.asarray(gather_rows(alone, ids)) == exact[np.asarray(ids)]).all()


@pytest.mark.slow
def test_layouts_of_an_accelerator(tmp_path: Path) -> None:
    """Read for a GPU, matrices in Q4_0 are packed for its kernels, with the order of columns; values do not change."""
    path = write(
        dataclasses.replace(MOE, hidden=256, heads=4, packing=Packing("gptq", 4, 32, ordered=True)), tmp_path / "model"
    )
    on_cpu = fj.load(path, dtype="float32").params["layers"]
    gpu = dataclasses.replace(Placement.of(), target=Target("gpu", "9.0"))
    with open_model(path) as model:
        places = parameters(model, model.config())
        on_gpu = read_parameters(model, places, gpu)["layers"]
    for part, name in (("attention", "query"), ("attention", "output"), ("feed_forward", "expert_gate")):
        ours, theirs = (tree[part][name].stacks["Q4_0+order"] for tree in (on_cpu, on_gpu))
        assert (ours.memory_layout, theirs.memory_layout) == ("ggml+order", "gpu+order") and ours.shape == theirs.shape
        index = (0,) * (len(ours.shape) - 2)
        one, other = (unpack_rows(tensor.operand(*index), 0, ours.shape[-2]) for tensor in (ours, theirs))
        assert (np.asarray(one) == np.asarray(other)).all() and np.asarray(one).std() > 0
