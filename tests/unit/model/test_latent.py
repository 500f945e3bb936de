"""Tiny models with attention over latent vectors (DeepSeek V2 and V3, GLM-4.7-Flash) against transformers in float32.

The numbers in tests/goldens/latent were made by transformers' own loading of the same directories.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import families
from ferrum_jax.cli import main
from ferrum_jax.config import Latent, Rope, RopeScaling
from ferrum_jax.convert import convert
from ferrum_jax.weights.opening import open_model
from support.golden_checks import check_greedy, check_logits
from support.goldens import tiny_directories, tiny_latent, tiny_models

pytestmark = pytest.mark.slow

PATH = Path("somewhere/config.json")
BY_NAME = {spec.name: spec for spec in tiny_latent.CASES}
PLAIN = [spec.name for spec in tiny_latent.CASES if not spec.formats]


def written(spec, folder, kind="gguf", **options):
    """The model of a case as a file or a directory."""
    path = folder / (f"{spec.name}.gguf" if kind == "gguf" else spec.name)
    (tiny_latent.write_gguf if kind == "gguf" else tiny_latent.write_directory)(spec, path, **options)
    return path


def values_of(source, name):
    """float32 numbers of a tensor."""
    info = source.tensors[name]
    raw, kind = source.read(info).reshape(np.prod(info.shape[:-1], dtype=int), -1), gguf.GGMLQuantizationType[info.format]
    return gguf.quants.dequantize(raw, kind).reshape(info.shape)


def golden(spec):
    with np.load(tiny_latent.HERE / f"{spec.name}.npz") as file:
        return dict(file)


def same_numbers(path, other, within=0.0):
    """Two checkpoints have one configuration and the same numbers."""
    with open_model(path) as one, open_model(other) as two:
        assert one.tensors.keys() == two.tensors.keys()
        for name in one.tensors:
            a, b = values_of(one, name), values_of(two, name)
            assert a.shape == b.shape and np.abs(a - b).max() <= within, name
        return one.config(), two.config()


@pytest.fixture(scope="module", params=BY_NAME)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case."""
    spec, folder = BY_NAME[request.param], tmp_path_factory.mktemp("latent")
    digest, arrays = tiny_latent.write_directory(spec, folder / "digest"), golden(spec)
    assert digest == str(arrays["digest"]), "not the numbers that the goldens were made from"
    prompts = tiny_models.prompts(spec.vocab, lengths=tiny_latent.LENGTHS)
    return fj.load(written(spec, folder), dtype="float32"), arrays, prompts


def test_logits(loaded) -> None:
    check_logits(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["deepseek3-q8_0", "deepseek2"], indirect=True)
def test_greedy_tokens(loaded) -> None:
    check_greedy(*loaded)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_directory_is_its_gguf_file(name, tmp_path):
    """In every number and in the configuration: so what holds of the logits of one holds of the other's."""
    spec = BY_NAME[name]
    one, other = same_numbers(written(spec, tmp_path), written(spec, tmp_path, "directory"))
    rounded = {"expert_weights_scale": 1.0, "rms_norm_eps": spec.eps}  # float32 in GGUF files
    assert abs(one.expert_weights_scale - other.expert_weights_scale) < 1e-6
    assert dataclasses.replace(one, **rounded) == dataclasses.replace(other, **rounded)


def test_the_cache_holds_one_vector_and_one_key_of_a_token(tmp_path, capsys):
    spec = BY_NAME["deepseek2-lite-q8_0"]
    path = written(spec, tmp_path)
    model = fj.load(path, dtype="float32")
    numbers = spec.layers * (spec.width + spec.rope)
    assert model.memory()["kv_bytes_per_token"] == 4 * numbers
    cache = fj.functional.new_cache(model.config, num_pages=3, page_size=16, dtype="float16")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 3 * 16 * 2 * numbers
    assert main(["info", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kv_bytes_per_token"]["float32"] == 4 * numbers and not facts["expanded"]
    assert facts["latent"] == [{"width": 64, "nope": 32, "values": 48, "query_width": 0, "score_log": 0.0}]
    assert main(["info", "--all", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 of 32 and 16 rotated, values of 48; all read one vector of 64 and one rotated key of a token" in text


# ---- files


@pytest.mark.parametrize("name", PLAIN)
def test_a_directory_becomes_the_gguf_file_of_llama_cpp(name, tmp_path):
    spec = BY_NAME[name]
    convert(written(spec, tmp_path, "directory"), tmp_path / "made.gguf", to="gguf")
    right = written(spec, tmp_path)
    one, other = same_numbers(tmp_path / "made.gguf", right)
    assert one == other
    made, known = (gguf.GGUFReader(path).fields for path in (tmp_path / "made.gguf", right))
    keys = {key for key in made if key.startswith("deepseek2.")}
    for key in (key for key in known if key.startswith("deepseek2.")):
        assert made[key].contents() == known[key].contents(), key
    groups = [vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type)]
    assert keys <= {str(key).replace("{arch}", "deepseek2") for group in groups for key in group}


@pytest.mark.parametrize("name", ["deepseek3", "deepseek2-lite-q8_0"])
def test_an_older_file_is_split_and_transposed_while_it_is_read(name, tmp_path, capsys):
    spec = BY_NAME[name]
    path, newer = tmp_path / "older.gguf", written(spec, tmp_path)
    tiny_latent.write_gguf(spec, path, older=True)
    # Blocks of the one matrix lie along the latent vector, also those of keys.
    config, other = same_numbers(path, newer, within=0.02 if spec.formats else 0.0)
    assert config == other
    with open_model(path) as source:
        formats = {source.tensors[f"blk.0.attn_{x}_b.weight"].format for x in "kv"}
    assert formats == ({"F32", "Q8_0"} if spec.formats else {"F32"})
    assert main(["info", str(path)]) == 0
    assert ("tensors of an older file become F32" in " ".join(capsys.readouterr().out.split())) == bool(spec.formats)
    convert(path, tmp_path / "made.gguf", to="gguf")
    assert same_numbers(tmp_path / "made.gguf", path) == (config, config)
    assert "deepseek2.attention.key_length_mla" in gguf.GGUFReader(tmp_path / "made.gguf").fields


def test_blocks_that_predict_further_tokens_are_passed_over(tmp_path):
    spec = BY_NAME["deepseek3"]
    path = written(dataclasses.replace(spec, layers=4), tmp_path, "directory", num_hidden_layers=3)
    with open_model(path) as source:
        assert source.config().num_layers == 3
        assert source.passed_over and all(name.startswith("model.layers.3.") for name in source.passed_over)


def test_a_router_that_the_file_does_not_name(tmp_path):
    """A bias of the choice is that of sigmoids; without one a softmax is meant."""
    for name, scoring in (("deepseek3", "sigmoid"), ("deepseek2", "softmax")):
        path = written(BY_NAME[name], tmp_path, scoring=False)
        with open_model(path) as source, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert source.config().router_scoring == scoring
        text = "key deepseek2.expert_gating_func: is missing; the biases exp_probs_b are those of DeepSeek V3"
        assert [text in str(warning.message) for warning in caught] == [True] * (scoring == "sigmoid")


def test_keys_that_are_not_there_are_those_of_the_class():
    """The sizes of DeepSeek-V3 and of GLM-4.7-Flash, and what Kimi K2 is published as."""
    for model_class, kind, dense, nope, values, query in (
        ("DeepseekV3ForCausalLM", "deepseek_v3", 3, 128, 128, 1536),
        ("DeepseekV3ForCausalLM", "kimi_k2", 3, 128, 128, 1536),
        ("Glm4MoeLiteForCausalLM", "glm4_moe_lite", 1, 192, 256, 768),
    ):
        content = {"architectures": [model_class], "model_type": kind, "hidden_size": 64, "num_hidden_layers": 5,
                   "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
                   "intermediate_size": 96, "n_routed_experts": 64}  # fmt: skip
        file = families.of_content(content, PATH).read_json(content, PATH)
        assert file.family.model_type == kind and file.config.dense_layers == tuple(range(dense))
        (mixer,) = set(file.config.attentions)
        assert mixer.latent == Latent(512, nope, values, query)
        assert (mixer.rope, mixer.num_kv_heads, mixer.head_dim) == (Rope(1e4, 64), 1, 576)


def test_the_factor_of_scores():
    """That of YaRN counts twice, for queries and keys; mscale over mscale_all_dim multiplies cos and sin."""
    content = tiny_latent.config_json(BY_NAME["deepseek3"])
    content["rope_scaling"] |= {"mscale": 0.5, "mscale_all_dim": 0.8}
    file = families.of_content(content, PATH).read_json(content, PATH)
    mixer, log = file.config.attentions[0], 0.1 * np.log(8)
    assert np.isclose(mixer.score_scale, 48**-0.5 * (0.8 * log + 1) ** 2)
    assert np.isclose(mixer.rope.scaling.attention_factor, (0.5 * log + 1) / (0.8 * log + 1))
    with pytest.raises(fj.UnsupportedModelError, match="mscale other than mscale_all_dim cannot be written as GGUF"):
        file.family.to_gguf(file.config, "somewhere")
    fields = json.loads(json.dumps(dataclasses.asdict(file.config)))
    assert fj.ModelConfig.from_fields(fields) == file.config and isinstance(mixer.rope.scaling, RopeScaling)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("deepseek3", {"attention_bias": True}, "key attention_bias: true is not supported"),
        ("deepseek3", {"rope_interleave": False}, "key rope_interleave: false is not supported"),
        ("deepseek3", {"num_key_value_heads": 2}, "key num_key_value_heads: is 2; it must be num_attention_heads 4"),
        ("deepseek3", {"scoring_func": "softmax"}, "key scoring_func: 'softmax' is not supported; sigmoid is"),
        ("deepseek3", {"qk_rope_head_dim": 15}, "key qk_rope_head_dim: is 15; it must be even"),
        ("deepseek3", {"kv_lora_rank": 48}, r"self_attn\.\w+\.weight: shape"),
        ("deepseek2", {"topk_method": "noaux_tc"}, "key topk_method: 'noaux_tc' is not supported"),
        ("deepseek2", {"norm_topk_prob": True}, "key norm_topk_prob: true is not supported"),
        ("glm4-lite", {"mlp_layer_types": ["sparse", "dense"]}, "key mlp_layer_types: only dense layers before sparse ones"),
        ("glm4-lite", {"mlp_layer_types": ["dense"]}, "key mlp_layer_types: must say dense or sparse for each of the 2"),
    ],
)
def test_what_does_not_fit_is_named(name, changes, text, tmp_path):
    path = written(BY_NAME[name], tmp_path, "directory", **changes)
    with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=text):
        fj.load(path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("attention.key_length", 99, "key_length: is 99; with these of the latent vector it must be 80"),
        ("attention.value_length", 99, "value_length: is 99; with these of the latent vector it must be 64"),
        ("attention.key_length_mla", 16, r"key_length_mla: is 16; it must be above rope\.dimension_count 16"),
        ("attention.kv_lora_rank", None, "kv_lora_rank: is missing"),
        ("expert_gating_func", 3, "expert_gating_func: is 3"),
    ],
)
def test_a_key_that_does_not_fit_is_named(key, value, text, tmp_path):
    with open_model(written(BY_NAME["deepseek3"], tmp_path)) as source:
        source.metadata.pop(f"deepseek2.{key}")
        source.metadata |= {} if value is None else {f"deepseek2.{key}": value}
        with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=f"key deepseek2.*{text}"):
            source.config()


# ---- what is added to the weights, and other ways to keep them


@pytest.mark.parametrize(("name", "kind"), [("deepseek3", "gguf"), ("glm4-lite", "directory")])
def test_an_adapter_of_every_projection_is_as_if_merged_by_hand(name, kind, tmp_path):
    """The matrices W of the directory become W + B A alpha / rank, which is what an adapter means."""
    spec, rng, rank = BY_NAME[name], np.random.default_rng(3), 4
    entries, factors = [], []
    for module, values in tiny_latent.tensors(spec):
        if "self_attn" in module and "norm" not in module:
            rows, columns = values.shape
            a, b = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
            stem = f"base_model.model.{module.removesuffix('.weight')}.lora_"
            factors += [(f"{stem}A.weight", a), (f"{stem}B.weight", b)]
            values = values + b @ a * 2
        entries.append((module, "F32", values.shape, values.astype("<f4").tobytes()))
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    tiny_latent.write_directory(spec, merged)
    (merged / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    made = [(key, "F32", values.shape, values.tobytes()) for key, values in factors]
    (adapter / "adapter_model.safetensors").write_bytes(tiny_directories.safetensors(made))

    path, prompts = written(spec, tmp_path, kind), tiny_models.prompts(spec.vocab, lengths=(1, 17))
    with open_model(path, merge_adapter=adapter) as source, open_model(merged) as other:
        for key in source.tensors:
            assert np.abs(values_of(source, key) - values_of(other, key)).max() <= 1e-5, key
    right = fj.load(merged, dtype="float32").logits(prompts)
    found = fj.load(path, dtype="float32", adapters={"one": adapter}).logits(prompts, adapter="one")
    for one, other in zip(found, right, strict=True):
        assert np.abs(one - other).max() <= 1e-3


def test_orbax_and_a_routing(tmp_path):
    spec = BY_NAME["deepseek2-lite-q8_0"]
    path, prompts = written(spec, tmp_path), tiny_models.prompts(spec.vocab, lengths=(1, 17))
    convert(path, tmp_path / "made", to="orbax")
    one, other = (fj.load(source, dtype="float32") for source in (path, tmp_path / "made"))
    assert one.config == other.config
    assert all(map(np.array_equal, one.logits(prompts), other.logits(prompts)))
    assert one.trace_routing(prompts[1]).expert_weights.shape == (spec.layers - spec.dense, 17, spec.top_k)


def test_plain_xla_gives_what_the_cpp_kernels_give(tmp_path):
    """Of products by head in int8; all others are the same in both."""
    spec = BY_NAME["deepseek2-lite-q8_0"]
    path, prompts = written(spec, tmp_path), tiny_models.prompts(spec.vocab, lengths=(1, 17))
    forced = None, {"matmul_by_head": "composed"}
    found = [fj.load(path, dtype="int8", implementation=implementation).logits(prompts) for implementation in forced]
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() <= 0.5
