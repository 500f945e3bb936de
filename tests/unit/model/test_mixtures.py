"""Tiny models whose routers have sigmoids and a bias of the choice, and kin of theirs with short convolutions, against
transformers in float32, from GGUF files and from directories.

The numbers in tests/goldens/mixtures were made by transformers' own loading of the same directories.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import families
from ferrum_jax import functional as F
from ferrum_jax.cli import main
from ferrum_jax.config import ShortConv
from ferrum_jax.convert import convert
from ferrum_jax.weights.opening import open_model
from pallas_kernels import dispatch
from support.compiler import needs_compiler
from support.directories import edit_tensors
from support.golden_checks import check_greedy, check_logits
from support.goldens import tiny_directories, tiny_mixtures, tiny_models

pytestmark = pytest.mark.slow

PATH = Path("somewhere/config.json")
BY_NAME = {spec.name: spec for spec in tiny_mixtures.CASES}


def written(spec, folder, kind, **more):
    """The model of a case as a file or a directory."""
    path = folder / (f"{spec.name}.gguf" if kind == "gguf" else spec.name)
    (tiny_mixtures.write_gguf if kind == "gguf" else tiny_mixtures.write_directory)(spec, path, **more)
    return path


KINDS = [(spec.name, "gguf") for spec in tiny_mixtures.CASES] + [("glm4moe", "directory"), ("lfm2moe", "directory")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case."""
    name, kind = request.param
    spec, folder = BY_NAME[name], tmp_path_factory.mktemp("mixture")
    digest = tiny_mixtures.write_directory(spec, folder / "digest")
    with np.load(tiny_mixtures.HERE / f"{name}.npz") as file:
        arrays = dict(file)
    assert digest == str(arrays["digest"]), "not the numbers that the goldens were made from"
    prompts = tiny_models.prompts(spec.vocab, lengths=tiny_mixtures.LENGTHS)
    return fj.load(written(spec, folder, kind), dtype="float32"), arrays, prompts


def test_logits(loaded) -> None:
    check_logits(*loaded)


@needs_compiler
def test_the_call_of_all_layers_says_why_it_does_not_serve(tmp_path):
    """It has no short convolutions."""
    model = fj.load(written(BY_NAME["lfm2moe-q8_0"], tmp_path, "gguf"), dtype="int8")
    with dispatch.record() as choices:
        model.logits([[3, 4, 5]])
    found = [choice for choice in choices if choice.operation == "decoder_layers"]
    assert found and {choice.backend for choice in found} == {"composed"}
    assert any("native: has no ShortConv layers" in choice.reason for choice in found), found


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [kind for kind in KINDS if kind[1] == "gguf"], ids="-".join, indirect=True)
def test_greedy_tokens(loaded) -> None:
    check_greedy(*loaded)


@pytest.mark.parametrize("name", BY_NAME)
def test_both_say_the_same(name, tmp_path):
    spec = BY_NAME[name]
    with open_model(written(spec, tmp_path, "gguf")) as file, open_model(written(spec, tmp_path, "directory")) as directory:
        assert file.tensors.keys() == directory.tensors.keys()
        one, other = file.config(), directory.config()
        assert one.layers == other.layers and one.dense_layers == (tuple(range(spec.dense)) if spec.experts else ())
        for name in file.tensors if not spec.formats else ():
            assert np.array_equal(*(source.read(source.tensors[name]) for source in (file, directory)))


@pytest.mark.parametrize(("kind", "block"), [("gguf", "blk.4"), ("directory", "model.layers.4")])
def test_blocks_that_predict_further_tokens_are_passed_over(kind, block, tmp_path, capsys):
    path = written(BY_NAME["glm4moe"], tmp_path, kind, nextn=True)
    with open_model(path) as source:
        assert source.config().num_layers == 4
        assert source.passed_over and all(name.startswith(f"{block}.") for name in source.passed_over)
    assert main(["info", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"tensors that predict further tokens or see pictures: {block}" in said


@pytest.mark.parametrize("name", ["glm4moe", "glm4moe-q8_0", "lfm2moe", "lfm2"])
def test_a_directory_becomes_the_gguf_file_of_llama_cpp(name, tmp_path):
    spec = BY_NAME[name]
    convert(written(spec, tmp_path, "directory"), tmp_path / "made.gguf", to="gguf")
    tiny_mixtures.write_gguf(spec, tmp_path / "right.gguf")
    made, right = (gguf.GGUFReader(tmp_path / f"{kind}.gguf") for kind in ("made", "right"))
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in right.tensors}
    assert {tensor.name for tensor in made.tensors} == values.keys()
    assert all(np.array_equal(tensor.data, values[tensor.name]) for tensor in made.tensors)
    known = {key: field.contents() for key, field in right.fields.items() if key.startswith(f"{spec.arch}.")}
    found = {key: made.fields[key].contents() for key in known if key in made.fields}
    assert {key for key in known if not known[key]} >= known.keys() - found.keys()
    assert all(found[key] == pytest.approx(known[key]) for key in found)


@pytest.mark.parametrize("name", ["glm4moe", "lfm2moe"])
def test_a_text_has_the_same_bits_however_it_is_cut(name, tmp_path, monkeypatch):
    spec = BY_NAME[name]
    model = fj.load(written(spec, tmp_path, "gguf"), dtype="float32")
    prompts = tiny_models.prompts(spec.vocab, lengths=(17, 11))
    whole = model.logits(prompts)
    for chunk in (1, 7):
        monkeypatch.setattr(F, "CHUNK", chunk)
        assert all(map(np.array_equal, whole, model.logits(prompts)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4moe-q8_0", "lfm2moe-q8_0"])
def test_orbax_gives_the_same_bits(name, tmp_path):
    spec = BY_NAME[name]
    path = written(spec, tmp_path, "gguf")
    saved = convert(path, tmp_path / "made", to="orbax")
    again = convert(saved, tmp_path / "again.gguf", to="gguf")
    prompts = tiny_models.prompts(spec.vocab, lengths=(1, 17))
    one, *others = (fj.load(source, dtype="float32") for source in (path, saved, again))
    assert all(one.config == other.config for other in others)
    assert all(all(map(np.array_equal, one.logits(prompts), other.logits(prompts))) for other in others)


def test_a_routing_is_recorded_in_layers_with_experts(tmp_path):
    spec = BY_NAME["glm4moe"]
    model = fj.load(written(spec, tmp_path, "gguf"), dtype="float32")
    (prompt,) = tiny_models.prompts(spec.vocab, lengths=(9,))
    found = model.trace_routing(prompt)
    assert found.layers.tolist() == [1, 2, 3] and found.expert_ids.shape == (3, 9, spec.top_k)
    assert np.abs(found.expert_weights.sum(axis=-1) - spec.scale).max() <= 1e-5
    assert (np.diff(found.expert_weights, axis=-1) > 0).any()  # the bias moves the choice, not the weights


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("glm4moe", 4 * 4 + 3 + 3 * 3), ("lfm2moe", 4 + 3 * 2 + 3)])
def test_an_adapter_of_every_projection_is_as_if_merged_by_hand(name, count, tmp_path):
    """The matrices W of the directory become W + B A alpha / rank, which is what an adapter means."""
    spec, rng, rank = BY_NAME[name], np.random.default_rng(3), 4
    ending = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    entries, factors = [], []
    for made in tiny_mixtures.tensors(spec):
        values = made.values
        if made.module.endswith(ending) and ".experts." not in made.module:
            rows, columns = values.shape
            a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
            stem = f"base_model.model.{made.module.removesuffix('.weight')}.lora_"
            factors += [(f"{stem}A.weight", "F32", a.shape, a.tobytes()), (f"{stem}B.weight", "F32", b.shape, b.tobytes())]
            values = values + b @ a * 2
        entries.append((made.module, "F32", values.shape, values.astype("<f4").tobytes()))
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    tiny_mixtures.write_directory(spec, merged)
    (merged / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    (adapter / "adapter_model.safetensors").write_bytes(tiny_directories.safetensors(factors))
    assert len(factors) == 2 * count
    prompts = tiny_models.prompts(spec.vocab, lengths=(1, 17))
    right = fj.load(merged, dtype="float32").logits(prompts)
    path = written(spec, tmp_path, "gguf")
    found = fj.load(path, dtype="float32", adapters={"one": adapter}).logits(prompts, adapter="one")
    assert max(np.abs(one - other).max() for one, other in zip(found, right, strict=True)) <= 1e-3


Q_NORM = "model.layers.1.self_attn.q_norm.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("changes", "damage", "text"),
    [
        ({"use_qk_norm": False}, None, r"model\.layers\.0\.self_attn\.q_norm\.weight: is not expected according to config"),
        ({}, Q_NORM, r"model\.layers\.1\.self_attn\.q_norm\.weight: is missing, but config.json requires it"),
        ({}, BIAS, r"model\.layers\.2\.mlp\.gate\.e_score_correction_bias: is missing"),
        ({"attention_bias": False}, None, r"model\.layers\.0\.self_attn\.k_proj\.bias: is not expected according to config"),
        ({"n_group": 3}, None, "key n_group: 3 does not divide 8 experts into groups of at least 2"),
        ({"n_group": 4, "topk_group": 1}, None, "key topk_group: is 1; it must be from 1 to 4, and so large that"),
        ({"first_k_dense_replace": 4}, None, "key first_k_dense_replace: is 4; it must be from 0 to 3"),
        ({"num_local_experts": 9}, None, "key num_local_experts: is 9, but n_routed_experts is 8"),
    ],
)
def test_what_does_not_fit_is_named(changes, damage, text, tmp_path):
    path = written(BY_NAME["glm4moe"], tmp_path, "directory")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))
    if damage:
        edit_tensors(path / "model.safetensors", lambda tensors: tensors.pop(damage))
    with pytest.raises(fj.ModelFileError, match=text):
        fj.load(path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("expert_gating_func", 3, r"key glm4moe.expert_gating_func: is 3; only softmax \(1\) and sigmoid \(2\) are supported"),
        ("expert_group_count", 3, "key glm4moe.expert_group_count: 3 does not divide 8 experts into groups of at least 2"),
        ("leading_dense_block_count", 4, "key glm4moe.leading_dense_block_count: is 4; it must be from 0 to 3"),
        ("expert_count", None, "key glm4moe.expert_count: is missing"),
    ],
)
def test_a_key_that_does_not_fit_is_named(key, value, text, tmp_path):
    with open_model(written(BY_NAME["glm4moe"], tmp_path, "gguf")) as source:
        source.metadata |= {f"glm4moe.{key}": value}
        with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=text):
            source.config()


def test_keys_that_are_not_there(tmp_path):
    """The defaults of llama.cpp and of transformers' class."""
    spec = BY_NAME["glm4moe"]
    keys = (
        "expert_gating_func",
        "expert_weights_scale",
        "expert_weights_norm",
        "expert_group_count",
        "expert_group_used_count",
    )
    with open_model(written(spec, tmp_path, "gguf")) as source:
        for key in (*keys, "expert_shared_count", "leading_dense_block_count"):
            source.metadata.pop(f"glm4moe.{key}")
        config = source.config()
    assert (config.router_scoring, config.expert_weights_scale, config.norm_topk_prob) == ("sigmoid", 1.0, False)
    assert (config.shared_expert_size, config.dense_layers, config.expert_groups) == (0, (), 1)
    content = tiny_mixtures.config_json(spec)
    gone = {"norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "n_shared_experts", "partial_rotary_factor"}
    path = written(spec, tmp_path, "directory")
    (path / "config.json").write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))
    with open_model(path) as source:
        config = source.config()
    assert (config.norm_topk_prob, config.expert_weights_scale, config.shared_expert_size) == (True, 1.0, 64)
    assert config.rope_dim == 32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"conv_bias": True}, "key conv_bias: true is not supported"),
        ({"layer_types": ["conv"] * 3}, "key layer_types: must be a list of 4 kinds"),
        (
            {"layer_types": ["conv"] * 3 + ["sliding_attention"]},
            r"key layer_types: \['sliding_attention'\] in this model class",
        ),
        ({"use_expert_bias": False}, r"model\.layers\.1\.feed_forward\.expert_bias: is not expected according to config"),
        ({"num_dense_layers": 4}, "key num_dense_layers: is 4; it must be from 0 to 3"),
        ({"conv_L_cache": 1}, "key conv_L_cache: is 1; it must be from 2 to 64"),
    ],
)
def test_what_does_not_fit_lfm2_is_named(changes, text, tmp_path):
    path = written(BY_NAME["lfm2moe"], tmp_path, "directory")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=text):
        fj.load(path)


def test_keys_of_lfm2(tmp_path):
    """The width of a dense layer is derived as transformers' class does it, and older files list the layers that attend."""
    content = tiny_mixtures.config_json(BY_NAME["lfm2"])

    def read(**changes):
        changed = {key: value for key, value in (content | changes).items() if value is not ...}
        return families.of_content(changed, PATH).read_json(changed, PATH)

    file = read()
    assert file.tied and file.config.intermediate_size == 192 and file.config.rope_theta == 1e4
    wide = read(block_auto_adjust_ff_dim=..., block_ff_dim=4608, block_ffn_dim_multiplier=1.3)
    assert wide.config.intermediate_size == 4096  # 3072 * 1.3 = 3993, up to a multiple of 256
    assert not read(tie_embedding=False).tied
    older = read(layer_types=..., full_attn_idxs=[2]).config
    assert [isinstance(spec.mixer, ShortConv) for spec in older.layers] == [True, True, False]
    with pytest.raises(fj.UnsupportedModelError, match=r"cannot be written as GGUF: llama\.cpp normalizes always in"):
        moe = written(BY_NAME["lfm2moe"], tmp_path, "directory")
        (moe / "config.json").write_text(json.dumps(json.loads((moe / "config.json").read_text()) | {"norm_topk_prob": False}))
        convert(moe, tmp_path / "made.gguf", to="gguf")
    with open_model(written(BY_NAME["lfm2"], tmp_path, "gguf")) as source:
        source.metadata["lfm2.attention.head_count_kv"] = 2
        with pytest.raises(fj.ModelFileError, match=r"key lfm2\.attention\.head_count_kv: must be a list, with 0"):
            source.config()
