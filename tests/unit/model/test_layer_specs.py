"""A configuration as a list of layers: made of keywords, changed, read back from what older versions wrote."""

import dataclasses
import json
from collections.abc import Mapping

import pytest

from ferrum_jax.config import Attention, Dense, LayerSpec, Mixture, ModelConfig, Rope, RopeScaling
from support.random_models import DENSE, MOE

# Written by `json.dumps(dataclasses.asdict(config))` when a ModelConfig had no layers, into Orbax checkpoints among others.
OLD: Mapping = json.loads(
    """{"architecture": "qwen3moe", "num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 16, "vocab_size": 320, "context_length": 512, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "rope_dim": 16,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_context": 128, "attention_factor": 1.138629436111989, "beta_fast":
    32.0, "beta_slow": 1.0}, "sliding_window": 32, "num_experts": 8, "experts_per_token": 2, "expert_intermediate_size": 32,
    "norm_topk_prob": true, "expert_weights_scale": 1.0, "dense_layers": [1], "dtype": "float32"}"""
)
SCALING = RopeScaling("yarn", 4.0, 128, 1.138629436111989)
ATTENTION = Attention(4, 2, 16, Rope(10000.0, 16, SCALING), window=32)


def test_a_configuration_of_before_there_were_layers() -> None:
    config = ModelConfig.from_fields(OLD)
    mixture, dense = LayerSpec(ATTENTION, Mixture(8, 2, 32, normalize=True)), LayerSpec(ATTENTION, Dense(96))
    assert config.layers == (mixture, dense, mixture, mixture)
    assert (config.architecture, config.hidden_size, config.vocab_size, config.context_length) == ("qwen3moe", 64, 320, 512)
    values = {name: getattr(config, name) for name in OLD}
    assert values == OLD | {"rope_scaling": SCALING, "dense_layers": (1,)}
    assert config.expert_layers == (0, 2, 3)


@pytest.mark.parametrize("config", [DENSE, MOE, ModelConfig.from_fields(OLD)])
def test_fields_come_back(config: ModelConfig) -> None:
    windowed = dataclasses.replace(config.layers[0], mixer=dataclasses.replace(config.layers[0].mixer, window=7))
    for layers in (config.layers, (windowed, *config.layers[1:])):
        config = dataclasses.replace(config, layers=layers)
        again = ModelConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config))))
        assert again == config and hash(again) == hash(config)


def test_numbers_that_differ() -> None:
    first, *others = ModelConfig.from_fields(OLD).layers
    full = dataclasses.replace(first, mixer=dataclasses.replace(first.mixer, window=0, num_heads=8))
    config = dataclasses.replace(ModelConfig.from_fields(OLD), layers=(full, *others))
    assert config.num_kv_heads == config.by_layer("num_kv_heads") == 2
    assert config.by_layer("sliding_window") == (0, 32, 32, 32)
    assert config.by_layer("expert_intermediate_size") == 32 and config.by_layer("intermediate_size") == 96
    with pytest.raises(ValueError, match=r"sliding_window differs from layer to layer: by_layer\('sliding_window'\)"):
        _ = config.sliding_window
    with pytest.raises(ValueError, match="num_layers is 2, but the 4 layers differ; state `layers`"):
        dataclasses.replace(config, num_layers=2)
    wider = Mixture(8, 2, 64, normalize=True)
    config = dataclasses.replace(config, layers=(dataclasses.replace(full, feed_forward=wider), *others))
    assert config.by_layer("expert_intermediate_size") == (64, None, 32, 32)


def test_every_layer_is_changed() -> None:
    """Next to `layers`, as `dataclasses.replace` calls it, keywords change what layers have and nothing else."""
    config = dataclasses.replace(ModelConfig.from_fields(OLD), experts_per_token=3, sliding_window=0, rope_theta=5e5)
    assert config.layers[1] == LayerSpec(Attention(4, 2, 16, Rope(5e5, 16, SCALING)), Dense(96))
    assert config.layers[0] == LayerSpec(config.layers[1].mixer, Mixture(8, 3, 32, normalize=True))
    assert dataclasses.replace(MOE, num_layers=48).layers == MOE.layers[:1] * 48
    assert dataclasses.replace(MOE, num_experts=0, intermediate_size=64).layers[0].feed_forward == Dense(64)
    assert dataclasses.replace(DENSE, num_experts=4, experts_per_token=2).layers[0].feed_forward == Mixture(4, 2, 0)
    with pytest.raises(TypeError, match="ModelConfig has no field nonsense"):
        dataclasses.replace(MOE, nonsense=1)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"nonsense": 1}, TypeError),
        ({"num_layers": 0}, ValueError),
        ({"layers": []}, ValueError),
        ({"num_layers": 2**40}, ValueError),
        ({"rope_scaling": {"kind": "yarn", "wide": 1}}, TypeError),
        ({"layers": [{"mixer": {"num_heads": 4}, "feed_forward": {"width": 8}}]}, TypeError),
    ],
)
def test_fields_of_nothing(fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        ModelConfig.from_fields(OLD | fields)
