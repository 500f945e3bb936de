"""config.json to configuration: what each key means, and what is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig, RopeScaling
from ferrum_jax.families import FAMILIES, of_content
from ferrum_jax.families.family import ConfigFile
from support import GOLDENS
from support.goldens import tiny_directories
from support.goldens.tiny_directories import Spec

PATH = Path("somewhere/config.json")
# Of layers that are alike; the others are in model/test_hybrids.py.
DECODERS = {family.model_type: family for family in FAMILIES if family.model_class in tiny_directories.MODEL_TYPES}
NAMES = {kind: family.model_class for kind, family in DECODERS.items()}
EXPERTS = {"experts": 8, "top_k": 2}


def content(kind: str = "llama", **keys: object) -> dict:
    """A sound config.json; a key of value ... is left out."""
    experts = EXPERTS if "moe" in kind or kind in ("mixtral", "gpt_oss") else {}
    made = tiny_directories.config_json(Spec("x", NAMES[kind], layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96,
                                             expert_ff=32, **experts)) | keys  # fmt: skip
    return {key: value for key, value in made.items() if value is not ...}


def read(kind: str = "llama", **keys: object) -> ConfigFile:
    made = content(kind, **keys)
    return of_content(made, PATH).read_json(made, PATH)


@pytest.mark.parametrize("kind", sorted(NAMES.keys() - {"gpt_oss"}))  # which has tests of its own: test_gpt_oss
def test_every_class(kind: str) -> None:
    file = read(kind)
    config = file.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 64, 4, 2, 16)
    assert (config.vocab_size, config.context_length, config.rms_norm_eps, config.rope_theta) == (320, 512, 1e-5, 10000.0)
    assert config.architecture == DECODERS[kind].architecture and file.family is DECODERS[kind]
    moe = kind in ("mixtral", "qwen3_moe")
    assert config.num_experts == (8 if moe else 0) and config.expert_intermediate_size == (32 if moe else 0)
    assert config.intermediate_size == (0 if moe else 96)
    assert config.norm_topk_prob == (kind == "mixtral")
    assert file.biases == (frozenset({"attn_q", "attn_k", "attn_v"}) if kind == "qwen2" else frozenset())
    assert config.sliding_window == (4096 if kind == "mistral" else 0)
    assert ModelConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert read(kind, architectures=...).config == config


def test_defaults_of_files_from_before_a_key() -> None:
    config = read(rope_theta=..., num_key_value_heads=..., head_dim=..., tie_word_embeddings=...).config
    assert (config.rope_theta, config.num_kv_heads, config.head_dim) == (10000.0, 4, 16)
    assert read("mixtral", rope_theta=None).config.rope_theta == 1e6
    assert read("qwen3", head_dim=...).config.head_dim == 128
    assert read("mistral", sliding_window=None).config.sliding_window == 0


NEEDED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
          "max_position_embeddings", "rms_norm_eps"]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [*(("llama", key) for key in NEEDED), ("qwen3_moe", "moe_intermediate_size"),
                                           ("qwen3_moe", "num_experts_per_tok"), ("mixtral", "num_local_experts")])  # fmt: skip
def test_a_missing_key_is_named(kind: str, key: str) -> None:
    with pytest.raises(fj.ModelFileError, match=f"config.json: key {key}: is missing"):
        read(kind, **{key: ...})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "architectures: GPT2LMHeadModel is not supported"),
        ({"architectures": ..., "model_type": "phi3"}, "architectures: phi3 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size: 8192 is not supported"),
        ({"per_layer_config": {"0": {"intermediate_size": 32}}}, "per_layer_config"),
        ({"is_causal": False}, "is_causal: false is not supported"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization: {'group_size': 64, 'bits': 4} is not supported"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1]}}, "short_factor is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention: parameters by kind of layer"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)
def test_a_feature_that_is_not_there_is_named(keys: dict, said: str) -> None:
    with pytest.raises(fj.UnsupportedModelError, match=rf"config\.json: .*{said}"):
        read(**keys)


IGNORED = {"use_qk_norm": True, "activation": "swiglu", "attn_logit_softcapping": 50.0, "logit_scale": 0.0625, "a_new_key": [1],
           "vision_config": {"depth": 2}, "embedding_multiplier": 12.0, "temperature": 0.6}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_a_key_that_is_no_field_of_the_class_changes_nothing(kind: str) -> None:
    """transformers' classes have none of these keys; biases and windows count only if the class has the key."""
    plain = read(kind)
    more: dict = IGNORED if kind == "gpt_oss" else IGNORED | {"original_max_position_embeddings": 64}  # which YaRN heeds
    if kind in ("mistral", "mixtral", "qwen2"):
        more |= {"attention_bias": True, "mlp_bias": True}
    found = read(kind, **more)
    assert (found.config, found.biases) == (plain.config, plain.biases)


def test_whether_the_range_of_yarn_is_rounded() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    for stated, rounded in (({}, True), ({"truncate": True}, True), ({"truncate": False}, False)):
        assert read(rope_scaling=yarn | stated).config.rope_scaling.truncate == rounded


def test_keys_of_another_rope_type() -> None:
    """`original_max_position_embeddings` counts only for yarn and llama3, and next to rope_scaling it precedes the one
    within."""
    yarn = {"type": "yarn", "factor": 4.0, "finetuned": True, "a_new_key": 3}
    for keys, original in (({}, 512), ({"original_max_position_embeddings": 64}, 64)):
        scaling = read(rope_scaling=yarn, **keys).config.rope_scaling
        assert scaling is not None and scaling.original_context == original
        scaling = read(rope_scaling=yarn | {"original_max_position_embeddings": 128}, **keys).config.rope_scaling
        assert scaling is not None and scaling.original_context == (original if keys else 128)
    linear = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}
    both = read(rope_scaling=linear, rope_parameters=yarn | {"original_max_position_embeddings": 128})
    assert both.config.rope_scaling == read(rope_scaling={"type": "linear", "factor": 4.0}).config.rope_scaling


def test_the_table_of_fields_is_what_the_script_writes() -> None:
    pytest.importorskip("torch", reason="the script reads transformers' models, which need torch")
    scripts = GOLDENS / "scripts"
    spec = importlib.util.spec_from_file_location("make_config_fields", scripts / "make_config_fields.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if (found := module.transformers.__version__) != "5.24.0":
        pytest.skip(f"the table is of transformers 5.24.0, not {found}")
    assert module.text() == module.OUT.read_text()


HALF = {"layer_types": ["full_attention", "sliding_attention"] * 2}


@pytest.mark.parametrize(
    ("kind", "keys", "windows"),
    [
        *((kind, {"use_sliding_window": True, "max_window_layers": 3}, (0, 0, 0, 64)) for kind in ("qwen2", "qwen3")),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3} | HALF, (0, 64, 0, 64)),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 0}, (0, 0, 0, 0)),
        ("mistral", HALF, (0, 64, 0, 64)),
        ("mistral", {"layer_types": ["full_attention"] * 4}, (0, 0, 0, 0)),
    ],
)
def test_windows_of_some_layers(kind: str, keys: dict, windows: tuple[int, ...]) -> None:
    """As transformers has them: AutoModel takes a Mistral with layer_types for a Ministral."""
    config = read(kind, sliding_window=64, **keys).config
    assert tuple(spec.mixer.window for spec in config.layers) == windows
    assert ModelConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_windows_of_some_layers_where_the_class_has_none() -> None:
    for kind in ("mixtral", "qwen3_moe"):
        with pytest.raises(fj.UnsupportedModelError, match=r"layer_types: .* in one model of this class"):
            read(kind, use_sliding_window=True, sliding_window=64, **HALF)
    for kind, keys in (("qwen2", {"sliding_window": 64}), ("mistral", {"sliding_window": None})):
        with pytest.raises(fj.ModelFileError, match="names sliding_attention, but there is no sliding_window"):
            read(kind, **keys, **HALF)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"architectures": []}, "architectures"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
        ({"architectures": 7}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": ..., "hidden_size": 66}, "head_dim"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "key factor: is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 4.0,
                           "high_freq_factor": 4.0}}, "high_freq_factor"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": "gptq"}, "quantization_config"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(keys: dict, said: str) -> None:
    with pytest.raises(fj.ModelFileError, match=rf"config\.json: .*{said}"):
        read(**keys)


def test_mixture_keys_that_cannot_be_are_named() -> None:
    for key, value in (
        ("mlp_only_layers", [4]),
        ("mlp_only_layers", "0"),
        ("decoder_sparse_step", 0),
        ("num_experts_per_tok", 9),
    ):
        with pytest.raises(fj.ModelFileError, match=key):
            read("qwen3_moe", **{key: value})


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, ()),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 3}, (0, 1, 3)),
        ({"mlp_only_layers": [1, 3]}, (1, 3)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (0, 1, 2)),
        ({"decoder_sparse_step": 5}, None),
        ({"num_experts": 0}, None),
    ],
    ids=str,
)
def test_layers_without_experts(keys: dict, dense: tuple[int, ...] | None) -> None:
    config = read("qwen3_moe", **keys).config
    assert config.num_experts == (0 if dense is None else 8)
    assert config.dense_layers == (dense or ())
    assert config.intermediate_size == (0 if dense == () else 96)


def test_norm_topk_prob() -> None:
    assert read("qwen3_moe", norm_topk_prob=True).config.norm_topk_prob
    assert not read("qwen3_moe", norm_topk_prob=False).config.norm_topk_prob


@pytest.mark.parametrize(
    ("kind", "keys", "window"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mixtral", {"sliding_window": 32}, 32),
        ("qwen2", {"sliding_window": 32}, 0),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2}, 0),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 4}, 0),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True}, 0),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 32),
        ("qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, 0),
        ("qwen3_moe", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 32),
        ("llama", {"sliding_window": None}, 0),
    ],
)
def test_sliding_window(kind: str, keys: dict, window: int) -> None:
    assert read(kind, **keys).config.sliding_window == window


def test_rope_scaling() -> None:
    linear = {"type": "linear", "factor": 4.0}
    assert read(rope_scaling=linear).config.rope_scaling == RopeScaling("linear", 4.0)
    config = read(rope_theta=..., rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 5e5}).config
    assert (config.rope_scaling, config.rope_theta) == (RopeScaling("linear", 2.0), 5e5)
    assert read(rope_scaling={"rope_type": "default"}).config.rope_scaling is None

    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    config = read(rope_scaling=yarn).config
    assert config.context_length == 1024
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 256, 0.1 * np.log(4.0) + 1)
    more = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2.0}
    assert read(rope_scaling=yarn | more).config.rope_scaling == RopeScaling("yarn", 4.0, 256, 1.5, 16.0, 2.0)
    both = {"mscale": 2.0, "mscale_all_dim": 1.0}
    scaling = read(rope_scaling=yarn | both).config.rope_scaling
    assert scaling is not None and abs(scaling.attention_factor - (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)) <= 1e-15


def test_factors_of_llama3() -> None:
    """Wavelengths within a quarter of the original context keep their frequency, beyond all of it they are divided."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    file = read(rope_scaling=scaling | {"original_max_position_embeddings": 64})
    assert file.config.rope_scaling is None and file.rope_factors is not None and file.rope_factors.dtype == np.float32
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    assert (file.rope_factors[wavelengths < 16] == 1).all() and (file.rope_factors[wavelengths > 64] == 8).all()
    between = (wavelengths > 16) & (wavelengths < 64)
    assert between.any() and ((file.rope_factors[between] > 1) & (file.rope_factors[between] < 8)).all()
