"""Tiny models of Gemma against transformers in float32, from directories and from GGUF files.

The numbers in tests/goldens/gemma were made by transformers' own loading of the directories.
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
from ferrum_jax.config import RopeScaling
from ferrum_jax.convert import convert
from ferrum_jax.state import kv_layers, page_kinds
from ferrum_jax.weights.opening import open_model
from pallas_kernels import dispatch
from support.golden_checks import check_greedy, check_logits
from support.goldens import tiny_directories, tiny_gemma, tiny_models

pytestmark = pytest.mark.slow

PATH = Path("somewhere/config.json")
BY_NAME = {spec.name: spec for spec in tiny_gemma.CASES}
ARCHES = ["gemma3", "gemma4"]  # each the name of its case in F32
PLAIN = [*ARCHES, "gemma4-moe"]
KINDS = [(spec.name, "directory" if spec.dtype == "BF16" else "gguf") for spec in tiny_gemma.CASES]


def written(spec, folder, kind):
    """The model of a case as a file or a directory of that kind."""
    path = folder / (f"{spec.name}.gguf" if kind == "gguf" else spec.name)
    if kind == "gguf":
        tiny_gemma.write_gguf(spec, path)
    else:
        tiny_gemma.write_directory(spec, path, pictures=kind == "pictures")
    return path


def of_json(content):
    return families.of_content(content, PATH).read_json(content, PATH)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def loaded(request, tmp_path_factory):
    """(model, golden arrays, prompts) of one case."""
    name, kind = request.param
    spec, folder = BY_NAME[name], tmp_path_factory.mktemp("gemma")
    digest = tiny_gemma.write_directory(spec, folder / "digest")
    with np.load(tiny_gemma.HERE / f"{name}.npz") as file:
        arrays = dict(file)
    assert digest == str(arrays["digest"]), "not the numbers that the goldens were made from"
    prompts = tiny_models.prompts(spec.vocab, lengths=tiny_gemma.LENGTHS)
    return fj.load(written(spec, folder, kind), dtype="float32"), arrays, prompts


def test_logits(loaded) -> None:
    check_logits(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [("gemma4", "gguf")], ids="-".join, indirect=True)
def test_greedy_tokens(loaded) -> None:
    model, arrays, prompts = loaded
    check_greedy(model, arrays, prompts[:2])


@pytest.mark.parametrize("kind", ["directory", "pictures"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_directory_becomes_the_gguf_file_of_llama_cpp(name, kind, tmp_path, capsys):
    """Tensors are equal bit for bit, whichever of both is read."""
    spec, arch = BY_NAME[name], BY_NAME[name].arch
    path, right = written(spec, tmp_path, kind), written(spec, tmp_path, "gguf")
    convert(path, tmp_path / "made.gguf", to="gguf")
    with open_model(tmp_path / "made.gguf") as made, open_model(right) as known, open_model(path) as source:
        assert made.tensors.keys() == known.tensors.keys() == source.tensors.keys()
        for name, info in known.tensors.items():
            assert np.array_equal(known.read(info), made.read(made.tensors[name])), name
            assert np.array_equal(known.read(info), source.read(source.tensors[name])), name
        assert made.config() == source.config() == known.config()
    fields, keys = (gguf.GGUFReader(file).fields for file in (tmp_path / "made.gguf", right))
    for key in (key for key in keys if key.startswith(f"{arch}.")):
        assert fields[key].contents() == keys[key].contents(), key
    groups = [vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type)]
    assert {key for key in fields if key.startswith(arch)} <= {str(k).replace("{arch}", arch) for g in groups for k in g}
    if kind == "pictures":
        assert main(["info", str(path)]) == 0
        assert "2 tensors that predict further tokens or see pictures: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("name", "kind"), [("gemma3", "directory"), ("gemma4", "gguf")])
def test_an_adapter_of_every_projection_is_as_if_merged_by_hand(name, kind, tmp_path):
    """The matrices W of the directory become W + B A alpha / rank, which is what an adapter means."""
    spec, rng, rank = BY_NAME[name], np.random.default_rng(3), 4
    changed, entries, factors = [], [], []
    for module, values in tiny_gemma.tensors(spec):
        if ".layers." in module and values.ndim == 2:
            rows, columns = values.shape
            a, b = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
            stem = f"base_model.model.{module.removesuffix('.weight')}.lora_"
            factors += [(f"{stem}A.weight", a), (f"{stem}B.weight", b)]
            values = values + b @ a * 2
        changed.append((module, values))
        entries.append((module, "F32", values.shape, values.astype("<f4").tobytes()))
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    tiny_gemma.write_directory(spec, merged)
    (merged / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    made = [(key, "F32", values.shape, values.tobytes()) for key, values in factors]
    (adapter / "adapter_model.safetensors").write_bytes(tiny_directories.safetensors(made))

    prompts = tiny_models.prompts(spec.vocab, lengths=(1, 17))
    right = fj.load(merged, dtype="float32").logits(prompts)
    path = written(spec, tmp_path, kind)
    with open_model(path, merge_adapter=adapter) as source, open_model(merged) as other:
        for key, info in source.tensors.items():
            a, b = (one.read(one.tensors[key]).view("<f4") for one in (source, other))
            assert np.abs(a - b).max() <= 1e-5, (key, info.shape)
    found = fj.load(path, dtype="float32", adapters={"one": adapter}).logits(prompts, adapter="one")
    for one, other in zip(found, right, strict=True):
        assert np.abs(one - other).max() <= 1e-3


def test_orbax_gives_the_same_bits(tmp_path):
    spec = BY_NAME["gemma4"]
    path = written(spec, tmp_path, "gguf")
    convert(path, tmp_path / "made", to="orbax")
    prompts = tiny_models.prompts(spec.vocab, lengths=(1, 17))
    one, other = (fj.load(source, dtype="float32") for source in (path, tmp_path / "made"))
    assert one.config == other.config
    assert all(map(np.array_equal, one.logits(prompts), other.logits(prompts)))


# ---- Gemma 3


def test_keys_that_are_not_there_are_those_of_the_class():
    """As the published files of the 4B model, which state only what differs."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    content = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    file = of_json(content | {"vision_config": {"image_size": 896}, "mm_tokens_per_image": 256})
    config = file.config
    assert file.tied and (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert [mixer.window for mixer in config.attentions] == [1024 if (number + 1) % 6 else 0 for number in range(34)]
    full, sliding = (next(m for m in config.attentions if bool(m.window) is slides) for slides in (False, True))
    assert (full.rope.theta, full.rope.scaling) == (1e6, RopeScaling("linear", 8.0))
    assert (sliding.rope.theta, sliding.rope.scaling) == (1e4, None)
    assert {mixer.score_scale for mixer in config.attentions} == {1 / 16} and config.context_length == 131_072


def test_older_keys_are_read_as_newer_ones():
    """Those of the published 1B model, and what transformers 5 writes of them."""
    spec = dataclasses.replace(BY_NAME["gemma3"], rope_factor=4.0)
    new = tiny_gemma.config_json(spec)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": spec.theta, "rope_local_base_freq": spec.local_theta, "sliding_window_pattern": 6}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert of_json(old).config == of_json(new).config


def test_the_model_of_62_layers_has_a_scale_of_its_own(tmp_path):
    """GGUF files do not state it; 27B: 1 / sqrt(5376 / 32), its heads being 128 wide."""
    slides = tuple(bool((number + 1) % 6) for number in range(62))
    spec = dataclasses.replace(BY_NAME["gemma3"], name="deep", hidden=32, heads=2, kv_heads=1, ff=32, slides=slides, scalar=16)
    with open_model(written(spec, tmp_path, "gguf")) as source:
        assert {mixer.score_scale for mixer in source.config().attentions} == {0.25}
    convert(written(spec, tmp_path, "directory"), tmp_path / "made.gguf", to="gguf")
    wrong = dataclasses.replace(spec, name="wrong", scalar=32)
    with pytest.raises(fj.UnsupportedModelError, match=r"query_pre_attn_scalar: 32 cannot be written as GGUF: .* takes 16"):
        convert(written(wrong, tmp_path, "directory"), tmp_path / "wrong.gguf", to="gguf")


@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True, False, True]])
def test_a_pattern_that_a_file_states_counts(pattern, tmp_path):
    spec = BY_NAME["gemma3"]
    with open_model(written(spec, tmp_path, "gguf")) as source:
        source.metadata["gemma3.attention.sliding_window_pattern"] = np.array(pattern) if isinstance(pattern, list) else pattern
        config = source.config()
    assert [bool(mixer.window) for mixer in config.attentions] == [True, True, False, True, True, False, True]
    assert config.attentions[2].rope.theta == spec.theta and config.attentions[3].rope.theta == spec.local_theta


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_activation": "gelu"}, "key hidden_activation: 'gelu' is not supported; supported: 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "key attention_bias: true is not supported"),
        ({"attn_logit_softcapping": 50.0}, "key attn_logit_softcapping: 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "key use_bidirectional_attention: True is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "key rope_parameters: must have objects under full_attention and"),
        ({"rope_parameters": {"wide": {}}}, "key rope_parameters: 'wide' is not supported; supported: full_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "factor: is missing"),
    ],
)
def test_what_gemma3_does_not_have_is_named(changes, text):
    with pytest.raises((fj.UnsupportedModelError, fj.ModelFileError), match=text):
        of_json(tiny_gemma.config_json(BY_NAME["gemma3"]) | changes)


# ---- Gemma 4


def test_layers_read_the_keys_and_values_of_the_last_layer_of_their_kind(tmp_path):
    spec = BY_NAME["gemma4"]
    with open_model(written(spec, tmp_path, "gguf")) as source:
        config = source.config()
    assert kv_layers(config) == (0, 1, 2, 3, 4, 3, 3, 4)
    assert [kind.layers for kind in page_kinds(config)] == [(0, 2, 3), (1, 4)]
    assert config.kv_bytes_per_token(2) == 2 * 2 * 2 * (3 * spec.head_dim + 2 * spec.full_dim)
    assert config.by_layer("intermediate_size") == (spec.ff,) * 5 + (2 * spec.ff,) * 3


def test_a_config_of_transformers_5_names_the_layers_that_differ():
    """It writes `per_layer_config` instead of `global_head_dim`."""
    spec = BY_NAME["gemma4-q8_0"]
    old = tiny_gemma.config_json(spec)
    wide = {"head_dim": spec.full_dim, "num_key_value_heads": spec.full_kv_heads}
    gone = {"global_head_dim": None, "num_global_key_value_heads": None}
    new = old | gone | {"per_layer_config": {"1": wide, "3": wide}}
    assert of_json(new).config == of_json(old).config
    with pytest.raises(fj.UnsupportedModelError, match=r"layer 1 of per_layer_config: key num_experts is not supported"):
        of_json(old | {"per_layer_config": {"1": wide | {"num_experts": 3}}})


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_keys_of_layers_that_share_them_are_not_needed(kind, tmp_path):
    """Published checkpoints have some in these layers, too."""
    spec, more = BY_NAME["gemma4"], tmp_path / "more"
    more.mkdir()
    path = written(spec, more, kind)
    if kind == "gguf":
        reader, path = gguf.GGUFReader(path), more / "again.gguf"
        writer = gguf.GGUFWriter(path, "gemma4")
        for key, field in reader.fields.items():
            if not key.startswith(("GGUF.", "general.architecture")):
                array = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], array)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        for name in ("attn_k", "attn_v", "attn_k_norm"):
            writer.add_tensor(f"blk.6.{name}.weight", np.ones((3, 5) if name != "attn_k_norm" else 3, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        found = [(name, "F32", values.shape, values.tobytes()) for name, values in tiny_gemma.tensors(spec)]
        extra = np.ones((3, 5), np.float32)
        found += [(f"model.layers.6.self_attn.{x}_proj.weight", "F32", extra.shape, extra.tobytes()) for x in "kv"]
        (path / "model.safetensors").write_bytes(tiny_directories.safetensors(found))
    with open_model(path) as source, open_model(written(spec, tmp_path, "gguf")) as known:
        assert source.tensors.keys() == known.tensors.keys() and source.config() == known.config()
        assert source.tensor_bytes == known.tensor_bytes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"enable_moe_block": True, "num_experts": 8}, "key top_k_experts: is missing"),
        ({"use_bidirectional_attention": "all"}, "key use_bidirectional_attention: only 'vision' is supported"),
        ({"vocab_size_per_layer_input": 7}, "key vocab_size_per_layer_input: 7 differs from vocab_size"),
        ({"num_kv_shared_layers": 7}, "key num_kv_shared_layers: a layer reads the keys and values of one before it"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type 'yarn' is not supported; supported: default, proportional",
        ),
    ],
)
def test_what_gemma4_does_not_have_is_named(changes, text):
    with pytest.raises((fj.UnsupportedModelError, fj.ModelFileError), match=text):
        of_json(tiny_gemma.config_json(BY_NAME["gemma4"]) | changes)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("expert_count", 8, "key gemma4.expert_used_count: is missing"),
        ("attention.sliding_window_pattern", None, "key gemma4.attention.sliding_window_pattern: must say true or false"),
        ("attention.key_length_swa", None, "key gemma4.attention.key_length_swa: is missing"),
        ("attention.value_length_swa", 7, "key gemma4.attention.value_length_swa: 7 differs from key_length_swa 32"),
        ("attention.shared_kv_layers", 8, "key gemma4.attention.shared_kv_layers: a layer reads the keys and values of one"),
        ("rope.dimension_count_swa", 31, "key gemma4.rope.dimension_count_swa: is 31; it must be even"),
    ],
)
def test_a_key_of_gemma4_that_does_not_fit_is_named(key, value, text, tmp_path):
    with open_model(written(BY_NAME["gemma4"], tmp_path, "gguf")) as source:
        source.metadata.pop(f"gemma4.{key}", None)
        source.metadata |= {} if value is None else {f"gemma4.{key}": value}
        with pytest.raises((fj.ModelFileError, fj.UnsupportedModelError), match=text):
            source.config()


@pytest.mark.parametrize("name", ["gemma3-q8_0", "gemma4-q8_0"])
def test_the_call_of_all_layers_says_why_it_does_not_serve(name, tmp_path):
    model = fj.load(written(BY_NAME[name], tmp_path, "gguf"), dtype="int8")
    with dispatch.record() as choices:
        model.logits([[3, 4, 5]])
    found = [choice for choice in choices if choice.operation == "decoder_layers"]
    assert found and all(choice.backend == "composed" for choice in found)
    assert any("has no GELU and no" in choice.reason or "of one head width" in choice.reason for choice in found), found
