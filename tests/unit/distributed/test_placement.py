"""Placements: what the rules make of the tables of families and of state, for meshes of absent devices; and the contents of
eight real devices of this machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import SingleDeviceSharding

import ferrum_jax
from benchmarks.tensors import tensors
from ferrum_jax import headers, memory
from ferrum_jax.config import Attention, Dense, EncoderConfig, GatedDeltaNet, LayerSpec, Mixture, ModelConfig, Rope
from ferrum_jax.distributed import RULES, Axis, Placement
from ferrum_jax.families import FAMILIES
from ferrum_jax.quantized import LayerStack
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels.blocks.ordered import SUFFIX
from pallas_kernels.dispatch import Target
from support import environment
from support.directories import LLAMA, Packing, write
from support.recurrent_toy import Toy

CPU, H100, V5E = Target("cpu"), Target("gpu", "9.0"), Target("tpu", "v5e")
MESH = {"expert": 4, "tensor": 2}
SMOLLM2 = ModelConfig(
    architecture="llama", hidden_size=576, vocab_size=49152, context_length=8192, rms_norm_eps=1e-5, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, rope_theta=1e5, rope_dim=64, intermediate_size=1536,
)  # fmt: skip
MINILM = EncoderConfig(
    architecture="bert", num_layers=6, hidden_size=384, intermediate_size=1536, num_heads=12, vocab_size=30522, num_types=2,
    context_length=512, text_length=256, layer_norm_eps=1e-12, pooling="mean",
)  # fmt: skip


def table(config: Any, format: str, **others: str) -> Any:
    """The parameters of a checkpoint with matrices in `format`, but those in `others` by the names of their parameters."""
    found = tensors(config, lambda name, layer, config: others.get(name, format))
    without_head = {tensor.name: tensor for tensor in found if tensor.name != "output.weight"}
    return parameters(SimpleNamespace(path="test", tensors=without_head, is_gguf=False), config)


def cuts(tree: Any, *path: str) -> tuple:
    """How a parameter is cut: of each axis of its planes (without the layers') the axes of the mesh."""
    node = tree if path[0] in tree else tree["layers"]
    for name in path:
        node = node[name]
    stacks = node.stacks.values() if isinstance(node, LayerStack) else [node]
    found = set()
    for stack in stacks:
        planes = stack.planes[: len(stack.planes) - stack.memory_layout.endswith(SUFFIX)]
        found |= {tuple(plane.sharding.spec)[isinstance(node, LayerStack) :] for plane in planes}
    (only,) = found
    return only


# ---- Rules


def test_every_axis_has_a_rule():
    rows = [row for family in FAMILIES for row in (*family.tensors.whole, *family.tensors.layer)]
    missing = {axis for row in rows for axis in row.axes} - RULES.keys()
    assert not missing, f"ferrum_jax/distributed/placement.py: RULES must say over what these axes are cut: {missing}"


def test_only_whole_runs_are_cut_and_only_evenly():
    placement = Placement.abstract(CPU, {"data": 3, "expert": 4, "tensor": 2})

    def over(name: str, size: int, run: int = 1) -> tuple[str, ...]:
        return placement.cuts([Axis(name, run)], [size])[0]

    assert over("vocab", 16) == ("expert", "tensor") and over("vocab", 6) == ("tensor",) and over("vocab", 4) == ("expert",)
    assert over("vocab", 15) == () and over("hidden", 24) == ()
    assert over("heads", 256, 64) == ("tensor",) and over("heads", 192, 64) == () and over("heads", 200, 64) == ()
    assert over("expert", 24) == ("data", "expert") and over("expert", 8) == ("expert",) and over("expert", 3) == ("data",)
    assert over("expert_width", 768, 256) == () and over("expert_width", 512, 256) == ("tensor",)
    # No axis of the mesh cuts two dimensions of one array.
    both = placement.cuts([Axis("vocab"), Axis("width")], [8, 8])
    assert both == (("expert", "tensor"), ()) and placement.parts(both) == (8, 1)


def test_one_device_is_a_mesh_of_one():
    device = jax.devices()[0]
    here = Placement.of()
    assert here == Placement.of(device) and here.device is device and str(here) == str(device) and here.platform == "cpu"
    assert here.sharding([Axis("vocab"), Axis("hidden")], [64, 8]) == here.replicated == SingleDeviceSharding(device)
    one, many = Placement.abstract(V5E), Placement.abstract(V5E, {"tensor": 4, "data": 2})
    assert (str(one), str(many), many.platform) == ("tpu v5e", "data=2, tensor=4 of tpu v5e", "tpu")
    assert one.replicated.shard_shape((6, 5)) == (6, 5)


# ---- Parameters


def test_qwen3_30b_a3b():
    """Against arithmetic over the header's own table: experts by 4, attention by 2, the vocabulary by 8. An expert's 768
    columns are three blocks of 256, so its width is not cut."""
    header = headers.bundled("qwen3:30b-a3b")
    places = parameters(header, header.config())
    tree = abstract_parameters(places, Placement.abstract(CPU, MESH))
    for name in ("query", "key", "value"):
        assert cuts(tree, "attention", name) == ("tensor", None)
    assert cuts(tree, "attention", "output") == (None, "tensor") and cuts(tree, "attention", "key_norm") == (None,)
    for name in ("expert_gate", "expert_up", "expert_down"):
        assert cuts(tree, "feed_forward", name) == ("expert", None, None)
    assert cuts(tree, "feed_forward", "router") == (None, None)
    assert cuts(tree, "embedding") == cuts(tree, "unembedding") == (("expert", "tensor"), None)

    parts = {"token_embd": 8, "output": 8, "attn_q": 2, "attn_k": 2, "attn_v": 2, "attn_output": 2}
    parts |= {f"ffn_{name}_exps": 4 for name in ("gate", "up", "down")}
    expected = sum(t.nbytes // parts.get(name.split(".")[-2], 1) for name, t in header.tensors.items())
    assert memory.nbytes(tree) == expected == 4_751_299_328
    assert memory.nbytes(abstract_parameters(places, Placement.abstract(H100, MESH))) == expected
    # Three devices along `tensor` have one block each of an expert's width, but not 32 / 3 heads.
    three = abstract_parameters(places, Placement.abstract(CPU, {"tensor": 3}))
    assert cuts(three, "feed_forward", "expert_gate") == (None, "tensor", None)
    assert cuts(three, "feed_forward", "expert_down") == (None, None, "tensor")
    assert cuts(three, "attention", "query") == cuts(three, "embedding") == (None, None)
    # With more devices than heads of keys and values, these are on all of them.
    eight = abstract_parameters(places, Placement.abstract(CPU, {"tensor": 8}))
    assert cuts(eight, "attention", "query") == ("tensor", None) and cuts(eight, "attention", "key") == (None, None)


def test_planes_of_a_tpu_are_those_of_the_parts():
    """There rows are on the lanes, padded to 128 on each device."""
    header = headers.bundled("qwen3:30b-a3b")
    tree = abstract_parameters(parameters(header, header.config()), Placement.abstract(V5E, MESH))
    rows = -(-151936 // 8 // 128) * 128
    assert [plane.sharding.shard_shape(plane.shape) for plane in tree["unembedding"].planes] == [
        (1024, rows), (512, rows), (128, rows), (8, rows)
    ]  # fmt: skip
    assert cuts(tree, "unembedding") == (None, ("expert", "tensor")) and cuts(tree, "attention", "output") == ("tensor", None)
    down = tree["layers"]["feed_forward"]["expert_down"].stacks["Q4_K"].planes
    assert [plane.sharding.shard_shape(plane.shape) for plane in down] == [(24, 32, size, 2048) for size in (384, 48, 8)]


def test_smollm2():
    """Nine heads, three of keys and values: cut by three, not by two."""
    places = table(SMOLLM2, "Q8_0")

    def q8(rows: int, columns: int) -> int:
        return rows * columns // 32 * 34

    norms, embedding = 4 * 576 * (2 * 30 + 1), q8(49152, 576)
    attention, dense = 30 * (2 * q8(576, 576) + 2 * q8(192, 576)), 30 * 3 * q8(1536, 576)
    for sizes, expected in (
        ({}, norms + embedding + attention + dense),
        (MESH, norms + embedding // 8 + attention + dense // 2),
        ({"tensor": 3}, norms + embedding // 3 + attention // 3 + dense // 3),
        ({"data": 8}, norms + embedding + attention + dense),
    ):
        assert memory.nbytes(abstract_parameters(places, Placement.abstract(CPU, sizes))) == expected
    tree = abstract_parameters(places, Placement.abstract(CPU, MESH))
    assert cuts(tree, "attention", "query") == (None, None) and cuts(tree, "feed_forward", "up") == ("tensor", None)
    assert cuts(tree, "feed_forward", "down") == (None, "tensor") and cuts(tree, "embedding") == (("expert", "tensor"), None)


def test_an_axis_is_cut_in_all_tensors_or_in_none():
    """The 1536 columns of `down` are six blocks of 256: four devices cannot share them, so they do not share the rows of `gate`
    and `up` either."""
    alike, mixed = table(SMOLLM2, "Q8_0"), table(SMOLLM2, "Q8_0", down="Q6_K")
    for places, devices, cut in ((alike, 4, True), (mixed, 4, False), (mixed, 3, True)):
        tree = abstract_parameters(places, Placement.abstract(CPU, {"tensor": devices}))
        assert cuts(tree, "feed_forward", "gate") == cuts(tree, "feed_forward", "up") == ("tensor" if cut else None, None)
        assert cuts(tree, "feed_forward", "down") == (None, "tensor" if cut else None)


def test_what_belongs_to_a_head_goes_with_it():
    """The gates of Qwen3.5's queries and the sinks of gpt-oss: numbers for each of 8 heads. In blocks of 256 columns the output
    matrix has pieces of 4 heads of 64."""
    rope = Rope(1e6, 64)
    delta = GatedDeltaNet(2, 4, 64, 64, taps=4, tiled=True)
    numbers = {"hidden_size": 256, "vocab_size": 512, "context_length": 64, "rms_norm_eps": 1e-6}
    gated = [LayerSpec(delta, Dense(512)), LayerSpec(Attention(8, 2, 64, rope, gated=True), Dense(512))]
    qwen = ModelConfig(architecture="qwen35", layers=tuple(gated), **numbers)
    oss = ModelConfig(architecture="gpt-oss", layers=(LayerSpec(Attention(8, 2, 64, rope), Mixture(4, 2, 256)),), **numbers)
    for config, name in ((qwen, "query"), (oss, "sinks")):
        for wide, devices, cut in (("Q8_0", 2, True), ("Q8_0", 4, True), ("Q6_K", 2, True), ("Q6_K", 4, False)):
            tree = abstract_parameters(table(config, "Q8_0", output=wide), Placement.abstract(CPU, {"tensor": devices}))
            assert (cuts(tree, "attention", name)[0] == "tensor") == (cuts(tree, "attention", "output")[1] == "tensor") == cut


@pytest.mark.parametrize(("method", "ordered"), [("gptq", False), ("awq", False), ("gptq", True)])
def test_packed_checkpoints(method: str, ordered: bool, tmp_path: Path):
    """Two heads of 32 columns and a width of two groups of 32. Columns in another order are not cut: those of a part would be
    anywhere in the matrix."""
    packing = Packing(method, 4, 32, symmetric=False, ordered=ordered)
    write(dataclasses.replace(LLAMA, dtype="F16", packing=packing), tmp_path / "model")
    with open_model(tmp_path / "model") as source:
        places = parameters(source, source.config())
    for devices, cut in ((2, not ordered), (4, False)):
        tree = abstract_parameters(places, Placement.abstract(CPU, {"tensor": devices}))
        axis = "tensor" if cut else None
        assert cuts(tree, "attention", "query") == cuts(tree, "feed_forward", "up") == (axis, None)
        assert cuts(tree, "attention", "output") == cuts(tree, "feed_forward", "down") == (None, axis)
        assert cuts(tree, "attention", "key") == (None, None)  # one head


def test_bert():
    """Six heads on each of two devices, 30522 rows of words cut by two (not by four), biases like the rows of their matrix."""
    tree = abstract_parameters(table(MINILM, "F32"), Placement.abstract(CPU, MESH))
    assert cuts(tree, "attention", "query_bias") == ("tensor",)
    assert cuts(tree, "attention", "output_bias") == cuts(tree, "feed_forward_norm") == (None,)
    assert cuts(tree, "embedding") == ("tensor", None) and cuts(tree, "positions") == (None, None)
    embeddings = 30522 // 2 * 384 + (512 + 2 + 2) * 384
    attention = 4 * (384 * 384 // 2) + 3 * (384 // 2) + 384
    dense = 2 * (1536 * 384 // 2) + 1536 // 2 + 384
    assert memory.nbytes(tree) == 4 * (embeddings + 6 * (attention + dense + 4 * 384))


# ---- State


@pytest.mark.parametrize(("devices", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pages_are_cut_by_heads(devices: int, kv_heads: int, dtype: str):
    """Qwen3-30B-A3B has four; with more devices each has the one that its queries need. `data` cuts the pages themselves."""
    config = headers.bundled("qwen3:30b-a3b").config()
    placement = Placement.abstract(CPU, {"data": 2, "tensor": devices})
    heads = kv_heads * devices
    (pool,) = memory.abstract_state(config, 6, 16, dtype, placement).pools
    assert pool.pages.shape == (48, 6, 16, 2 * heads, 128)
    assert pool.pages.sharding.shard_shape(pool.pages.shape) == (48, 3, 16, 2 * kv_heads, 128)
    if dtype == "int8":
        assert pool.scales.sharding.shard_shape(pool.scales.shape) == (48, 3, 16 * 2 * kv_heads)
    token = 2 * kv_heads * (128 + 4 if dtype == "int8" else 256)
    assert memory.nbytes(pool) == 48 * 3 * 16 * token
    (odd,) = memory.abstract_state(config, 5, 16, dtype, placement).pools
    assert memory.nbytes(odd) == 48 * 5 * 16 * token


@dataclasses.dataclass(frozen=True)
class Shared(Toy):
    @property
    def kept_axes(self) -> dict[str, tuple[str, ...]]:
        return {"tail": ("row", "width")}


def test_states_of_layers_that_recur_are_cut_by_the_axes_that_they_name():
    layers = tuple(dataclasses.replace(SMOLLM2.layers[0], mixer=mixer) for mixer in (Toy(6), Shared(6), Shared(8)))
    config = dataclasses.replace(SMOLLM2, layers=layers)
    placement = Placement.abstract(CPU, {"data": 2, "tensor": 2})
    state = memory.abstract_state(config, 2, 16, "float32", placement, num_states=4)
    local = [{name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in part.items()} for part in state.recurrent]
    assert local == [
        {"state": (1, 2, 6), "tail": (1, 2, 2, 6)},
        {"state": (1, 2, 6), "tail": (1, 2, 2, 3)},
        {"state": (1, 2, 8), "tail": (1, 2, 2, 4)},
    ]


# ---- Devices that are there


@pytest.mark.slow
def test_eight_devices_hold_what_was_computed():
    """Of the model in the package, read and put onto three meshes: see support/eight_devices.py."""
    model = Path(ferrum_jax.__file__).parent / "data" / "tiny-moe.gguf"
    command = [sys.executable, "-m", "support.eight_devices", str(model)]
    ended = subprocess.run(command, env=environment(JAX_PLATFORMS="cpu"), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(ended.stdout.splitlines()) == 5, ended.stdout
