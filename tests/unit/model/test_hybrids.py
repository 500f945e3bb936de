"""Tiny models with gated delta nets against transformers in float32, from directories and from GGUF files.

The numbers in tests/goldens/hybrids were made by transformers' own loading of the same directories.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import families
from ferrum_jax.cli import main
from ferrum_jax.config import Attention, GatedDeltaNet, Rope
from ferrum_jax.convert import convert
from ferrum_jax.weights.opening import open_model
from support.directories import edit_tensors
from support.golden_checks import check_greedy, check_logits
from support.goldens import tiny_directories, tiny_hybrids, tiny_models

pytestmark = pytest.mark.slow

PATH = Path("somewhere/config.json")
BY_NAME = {spec.name: spec for spec in tiny_hybrids.CASES}


def written(spec, folder, kind):
    """The model of a case as a file or a directory of that kind."""
    path = folder / (f"{spec.name}.gguf" if kind == "gguf" else spec.name)
    if kind == "gguf":
        tiny_hybrids.write_gguf(spec, path)
    else:
        tiny_hybrids.write_directory(spec, path, pictures=kind == "pictures")
    return path


def golden(spec):
    with np.load(tiny_hybrids.HERE / f"{spec.name}.npz") as file:
        return dict(file)


KINDS = [(spec.name, kind) for spec in tiny_hybrids.CASES for kind in ("gguf", "directory") if kind == "gguf" or not spec.mix]
GREEDY = [(name, kind) for name, kind in KINDS if kind == "gguf" and not BY_NAME[name].mix]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case."""
    name, kind = request.param
    spec, folder = BY_NAME[name], tmp_path_factory.mktemp("hybrid")
    digest = tiny_hybrids.write_directory(spec, folder / "digest")
    arrays = golden(spec)
    assert digest == str(arrays["digest"]), "not the numbers that the goldens were made from"
    prompts = tiny_models.prompts(spec.vocab, lengths=tiny_hybrids.LENGTHS)
    return fj.load(written(spec, folder, kind), dtype="float32"), arrays, prompts


def test_logits(loaded) -> None:
    check_logits(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", GREEDY, ids="-".join, indirect=True)
def test_greedy_tokens(loaded) -> None:
    check_greedy(*loaded)


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
def test_the_model_of_texts_and_pictures_is_its_text_part(name, tmp_path, capsys):
    spec = BY_NAME[name]
    path, text = written(spec, tmp_path, "pictures"), written(dataclasses.replace(spec, name="text"), tmp_path, "directory")
    with open_model(path) as source, open_model(text) as other:
        assert source.config() == other.config() and source.tensors.keys() == other.tensors.keys()
        for key, info in source.tensors.items():
            assert np.array_equal(source.read(info), other.read(other.tensors[key]))
    assert main(["info", str(path)]) == 0
    assert "3 tensors that predict further tokens or see pictures: model.visual, mtp" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("name", ["qwen35", "qwen3next"])
def test_blocks_that_predict_further_tokens_are_passed_over(name, tmp_path, capsys):
    spec = BY_NAME[name]
    plain, more = tmp_path / "plain.gguf", tmp_path / "more.gguf"
    tiny_hybrids.write_gguf(spec, plain, list_of_layers=False)
    tiny_hybrids.write_gguf(spec, more, nextn=True)
    with open_model(plain) as source, open_model(more) as other:
        assert other.config() == source.config() and other.tensors.keys() == source.tensors.keys()
        assert other.passed_over and all(name.startswith("blk.4.") for name in other.passed_over)
    assert main(["info", "--json", str(more)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recurrent_layers"] == 3 and "blk.4.nextn.eh_proj.weight" in facts["passed_over"]
    channels = 2 * spec.key_heads * spec.state + spec.value_heads * spec.state
    kept = (spec.taps - 1) * channels + spec.value_heads * spec.state**2
    assert facts["state_bytes"] == 3 * 4 * kept
    convert(more, tmp_path / "again.gguf", to="gguf")  # without them, and says so nowhere
    with open_model(tmp_path / "again.gguf") as again:
        assert not again.passed_over and again.config() == other.config()


@pytest.mark.parametrize("name", ["qwen35moe-q4_k_m", "qwen3next-q8_0"])
def test_tensors_that_hold_several(name, tmp_path):
    """Gate and up of all experts in one tensor, and Qwen3-Next's older `ssm_in`: the same bytes as in separate tensors."""
    spec = BY_NAME[name]
    plain, joined = tmp_path / "plain.gguf", tmp_path / "joined.gguf"
    tiny_hybrids.write_gguf(spec, plain)
    tiny_hybrids.write_gguf(spec, joined, join=True)
    with open_model(plain) as source, open_model(joined) as other:
        assert {info.name for info in other.tensors.values()} > {"blk.0.ffn_gate_up_exps.weight"}
        assert other.tensors.keys() == source.tensors.keys() and other.config() == source.config()
        for key, info in source.tensors.items():
            held = other.tensors[key]
            assert (held.format, held.shape) == (info.format, info.shape)
            assert np.array_equal(other.read(held), source.read(info)), key
            part = np.empty(info.nbytes // 3, np.uint8)
            other.read_into(held, part, info.nbytes // 2)
            assert np.array_equal(part, source.read(info)[info.nbytes // 2 :][: len(part)]), key
    convert(joined, tmp_path / "again.gguf", to="gguf")
    with open_model(plain) as source, open_model(tmp_path / "again.gguf") as other:
        assert all(np.array_equal(source.read(info), other.read(other.tensors[key])) for key, info in source.tensors.items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda found, made: [(name, array[:, 2:] if "gate_up" in name else array, kind) for name, array, kind in made],
            r"blk\.0\.ffn_gate_up_exps\.weight: shape \[8, 126, 128\]; expected 1024 rows in all",
        ),
        (
            lambda found, made: [*made, *(entry for entry in found if entry[0] == "blk.1.ffn_up_exps.weight")],
            r"blk\.1\.ffn_up_exps\.weight: is there twice: also in blk\.1\.ffn_gate_up_exps\.weight",
        ),
    ],
)
def test_tensors_that_hold_several_and_do_not_fit(change, text, tmp_path, monkeypatch):
    joined = tiny_hybrids.joined
    monkeypatch.setattr(tiny_hybrids, "joined", lambda spec, found: change(found, list(joined(spec, found))))
    tiny_hybrids.write_gguf(BY_NAME["qwen35moe"], tmp_path / "model.gguf", join=True)
    with pytest.raises(fj.ModelFileError, match=text):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe", "qwen3next"])
def test_a_directory_becomes_the_gguf_file_of_llama_cpp(name, tmp_path):
    spec = BY_NAME[name]
    convert(written(spec, tmp_path, "directory"), tmp_path / "made.gguf", to="gguf")
    made, right = gguf.GGUFReader(tmp_path / "made.gguf"), dict(tiny_hybrids.of_gguf(spec))
    assert {tensor.name for tensor in made.tensors} == right.keys()
    for tensor in made.tensors:
        values = right[tensor.name].reshape(tensor.data.shape)
        assert np.abs(tensor.data - values).max() <= 1e-6 * np.abs(values).max(), tensor.name
    groups = [vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type)]
    listed = {str(key).replace("{arch}", spec.arch) for group in groups for key in group}
    newer = {f"{spec.arch}.attention.recurrent_layers"}  # than this gguf-py; llama.cpp's programs read it
    assert {key for key in made.fields if key.startswith(spec.arch)} - newer <= listed
    tiny_hybrids.write_gguf(spec, tmp_path / "right.gguf")
    fields, known = made.fields, gguf.GGUFReader(tmp_path / "right.gguf").fields
    prefix = f"{spec.arch}."
    for key in (key for key in known if key.startswith(prefix)):
        if not key.endswith(("dimension_sections", "feed_forward_length")):
            assert fields[key].contents() == known[key].contents(), key
    with open_model(tmp_path / "made.gguf") as one, open_model(tmp_path / "right.gguf") as other:
        assert one.config() == other.config()


@pytest.mark.parametrize(("arch", "interval"), [("qwen35", None), ("qwen35moe", 3), ("qwen3next", 2)])
def test_keys_that_are_not_there_are_those_of_the_class(arch, interval):
    """The defaults of transformers' classes: every fourth layer attends, a quarter of each head is rotated."""
    content = tiny_hybrids.config_json(BY_NAME[arch])
    gone = {"layer_types", "partial_rotary_factor", "head_dim", "shared_expert_intermediate_size", "rope_theta"}
    gone |= {key for key in content if "linear" in key}
    content = {key: value for key, value in content.items() if key not in gone} | {"rope_parameters": {"rope_theta": 1e6}}
    content |= {"full_attention_interval": interval} if interval else {}
    config = families.of_content(content, PATH).read_json(content, PATH).config
    interval = interval or 4
    delta = GatedDeltaNet(16, 32, 128, 128, 4, tiled=arch != "qwen3next")
    assert [spec.mixer == delta for spec in config.layers] == [bool((number + 1) % interval) for number in range(4)]
    (attention,) = {spec.mixer for spec in config.layers if isinstance(spec.mixer, Attention)}
    assert attention == Attention(4, 2, 256, Rope(1e6, 64), gated=True)
    assert all(getattr(spec.feed_forward, "shared_width", 512) == 512 for spec in config.layers)


def refused(path, changes, key, kind=fj.UnsupportedModelError):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(kind, match=key):
        fj.load(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_bias": True}, "key attention_bias: true is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, r"key layer_types: \['sliding_attention'\] in this model class"),
        ({"linear_num_value_heads": 5}, "key linear_num_value_heads: 5 is not a multiple of linear_num_key_heads 2"),
        ({"layer_types": ["full_attention"]}, "key layer_types: must be a list of 4 kinds"),
        (
            {"linear_num_value_heads": 4},
            r"linear_attn\.\w+(\.weight)?: shape \[.+\]; expected (128 columns|256 rows|4 rows|128 rows)",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, text, tmp_path):
    refused(written(BY_NAME["qwen35"], tmp_path, "directory"), changes, text, (fj.ModelFileError, fj.UnsupportedModelError))


def test_packed_matrices_of_a_delta_net_are_refused(tmp_path):
    path, name = written(BY_NAME["qwen35"], tmp_path, "directory"), "model.layers.0.linear_attn.out_proj."
    edit_tensors(
        path / "model.safetensors", lambda t: t.update({f"{name}qweight": ("I32", (1, 1), t.pop(f"{name}weight")[2][:4])})
    )
    with pytest.raises(
        fj.UnsupportedModelError, match=r"out_proj\.qweight: is packed, but this matrix is supported in F32, F16"
    ):
        open_model(path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ssm.inner_size", 100, "key qwen35.ssm.inner_size: 100 is not a multiple of ssm.time_step_rank 6"),
        ("ssm.group_count", 4, "key qwen35.ssm.group_count: 4 does not divide ssm.time_step_rank 6"),
        ("ssm.conv_kernel", None, "key qwen35.ssm.conv_kernel: is missing"),
        ("attention.recurrent_layers", [True], "key qwen35.attention.recurrent_layers: must say true or false for each of"),
    ],
)
def test_a_key_that_does_not_fit_is_named(key, value, text, tmp_path):
    path = written(BY_NAME["qwen35"], tmp_path, "gguf")
    with open_model(path) as source:
        source.metadata.pop(f"qwen35.{key}")
        source.metadata |= {} if value is None else {f"qwen35.{key}": np.array(value) if isinstance(value, list) else value}
        with pytest.raises(fj.ModelFileError, match=text):
            source.config()


@pytest.mark.parametrize(("name", "kind"), [("qwen35", "gguf"), ("qwen35moe", "directory"), ("qwen3next", "directory")])
def test_an_adapter_of_every_projection_gives_what_peft_gives(name, kind, tmp_path):
    """And merged it makes of each matrix W of the directory W + B A alpha / rank; transformers does not reorder anything."""
    spec, added = BY_NAME[name], {f"{module}.weight": b @ a * 2 for module, a, b in tiny_hybrids.factors(BY_NAME[name])}
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    tiny_hybrids.write_directory(spec, merged)
    entries = [(key, values + added.pop(key, np.float32(0))) for key, values in tiny_hybrids.tensors(spec)]
    entries = [(key, "F32", values.shape, values.astype("<f4").tobytes()) for key, values in entries]
    (merged / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    tiny_hybrids.write_adapter(spec, adapter)
    path = written(spec, tmp_path, kind)
    with open_model(path, merge_adapter=adapter) as source, open_model(merged) as other:
        for key, info in source.tensors.items():
            a, b = (one.read(one.tensors[key]).view("<f4") for one in (source, other))
            assert np.abs(a - b).max() <= 1e-5, (key, info.shape)
    prompts = tiny_models.prompts(spec.vocab, lengths=tiny_hybrids.LENGTHS[:2])
    found = fj.load(path, dtype="float32", adapters={"one": adapter}).logits(prompts, adapter="one")
    with np.load(tiny_hybrids.HERE / f"{name}-adapter.npz") as right:
        for i, one in enumerate(found):
            assert np.abs(one - right[f"logits{i}"]).max() <= 1e-3


@pytest.mark.parametrize("name", ["qwen35moe", "qwen3next-q8_0"])
def test_orbax_gives_the_same_bits(name, tmp_path):
    spec = BY_NAME[name]
    path = written(spec, tmp_path, "gguf")
    convert(path, tmp_path / "made", to="orbax")
    prompts = tiny_models.prompts(spec.vocab, lengths=(1, 17))
    one, other = (fj.load(source, dtype="float32") for source in (path, tmp_path / "made"))
    assert one.config == other.config
    assert all(map(np.array_equal, one.logits(prompts), other.logits(prompts)))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_plain_xla_gives_what_the_cpp_kernels_give(dtype, tmp_path):
    spec = BY_NAME["qwen35moe-q8_0"]
    path, prompts = written(spec, tmp_path, "gguf"), tiny_models.prompts(spec.vocab, lengths=(1, 17))
    found = [fj.load(path, dtype=dtype, implementation=forced).logits(prompts) for forced in (None, {"delta_net": "xla"})]
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() <= (1e-3 if dtype == "float32" else 0.5)


def test_a_routing_is_recorded_in_every_layer(tmp_path):
    spec = BY_NAME["qwen35moe"]
    model = fj.load(written(spec, tmp_path, "gguf"), dtype="float32")
    (prompt,) = tiny_models.prompts(spec.vocab, lengths=(9,))
    layers, tokens, top_k = model.trace_routing(prompt).expert_weights.shape
    assert (layers, tokens, top_k) == (spec.layers, 9, spec.top_k)
