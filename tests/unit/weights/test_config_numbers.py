"""Numbers that no model can have, and metadata of another type than their key's: a ModelFileError that names the key."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.loading import validate
from ferrum_jax.weights.gguf import GGUFFile, open_gguf
from support.tiny_gguf import write_tiny_llama
from unit.weights.test_directory_config import read

NAN, INF = float("nan"), float("inf")
# Each key with values outside its allowed range, after some of real models.
NUMBERS = {
    "attention.layer_norm_rms_epsilon": ([1e-5, 1e-12], [0.0, -1e-5, 1.0, 1e30, NAN, INF]),
    "rope.freq_base": ([1e4, 5e6, 3.6e9], [0.0, -1e4, 1.0, 1e30, NAN, INF]),
    "rope.scaling.factor": ([2.0, 128.0], [1e-30, -4.0, 1e30, NAN, INF]),
    "rope.scaling.attn_factor": ([0.7, 2.0], [0.0, -1.0, 1e30, NAN]),
    "logit_scale": ([1.0], [-1.0, 1e30, NAN, INF]),
    "expert_weights_scale": ([2.5], [-1.0, 1e30, NAN]),
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
INTEGERS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"),
    *("attention.sliding_window", "expert_count", "expert_gating_func"),
)


PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # llama.cpp takes arrays of these alone


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    with open_gguf(write_tiny_llama(tmp_path_factory.mktemp("gguf") / "model.gguf")) as file:
        return file


def configured(header: GGUFFile, **changes: object) -> object:
    """The configuration with some keys of arch llama changed."""
    metadata = header.metadata | {f"llama.{key}": value for key, value in changes.items()}
    return GGUFFile(header.parts, metadata, header.tensors, {}).config()


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_gguf(key: str, header: GGUFFile) -> None:
    sane, insane = NUMBERS[key]
    for value in sane:
        configured(header, **{key: value})
    for value in insane:
        with pytest.raises(fj.ModelFileError, match=rf"model\.gguf: key llama\.{key}: is \S+; it must be finite and"):
            configured(header, **{key: value})


@pytest.mark.parametrize("key", ["yarn_beta_fast", "yarn_beta_slow", "factor", "yarn_log_multiplier"])
def test_numbers_of_yarn_in_gguf(key: str, header: GGUFFile) -> None:
    configured(header, **YARN, **({} if key == "factor" else {"rope.scaling." + key: 0.0 if "log" in key else 16.0}))
    for value in (-1.0, NAN, INF):
        with pytest.raises(fj.ModelFileError, match=rf"key llama\.rope\.scaling\.{key}: is"):
            configured(header, **YARN | {"rope.scaling." + key: value})
    with pytest.raises(fj.ModelFileError, match=r"yarn_beta_fast: is 1\.0; it must be at least \S+yarn_beta_slow, 4"):
        configured(header, **YARN, **{"rope.scaling.yarn_beta_fast": 1.0, "rope.scaling.yarn_beta_slow": 4.0})


WRONG = ["two", True, 2.5, [], ["a"] * 2, np.array([4, 4, 4]), np.array([True, False]), np.array([]), -1, 2**40, 2**64 - 1]


@pytest.mark.parametrize("key", INTEGERS)
def test_types_of_integers_in_gguf(key: str, header: GGUFFile) -> None:
    for value in WRONG:
        with pytest.raises(fj.ModelFileError, match=rf"model\.gguf: key llama\.{key}: ") as caught:
            configured(header, **{key: value})
        assert "\n" not in str(caught.value)
        assert not isinstance(value, np.ndarray) or key in PER_LAYER or "must be an integer, not an array" in str(caught.value)


@pytest.mark.parametrize("key", [*NUMBERS, "rope.scaling.type", "attention.causal"])
def test_types_of_other_keys_in_gguf(key: str, header: GGUFFile) -> None:
    text = key.endswith("type")
    for value in ([1.0], np.array([1.0, 2.0]), ["a", "b"], 1 if text or key.endswith("causal") else True, 1.5 if text else "1"):
        with pytest.raises(fj.ModelFileError, match=rf"model\.gguf: key llama\.{key}: must be"):
            configured(header, **{key: value})


@pytest.mark.parametrize("value", [["llama", "llama"], [1, 2], 7, True])
def test_architectures_that_are_no_text(value: object, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf", metadata={"general.architecture": value})
    for call in (fj.load, validate):
        with pytest.raises(fj.ModelFileError, match=r"model\.gguf: key general\.architecture"):
            call(path)


@pytest.mark.parametrize("key", ["block_count", "context_length"])
def test_counts_that_are_arrays_in_a_file(key: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf", metadata={f"llama.{key}": ([2, 2], gguf.GGUFValueType.ARRAY)})
    with pytest.raises(fj.ModelFileError, match=rf"key llama\.{key}: must be an integer, not an array of 2 values"):
        fj.load(path)


LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
JSON_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        *(({"rms_norm_eps": value}, "rms_norm_eps") for value in (0, -1e-5, 1.0, 1e30, 10**400)),
        *(({"rope_theta": value}, "rope_theta") for value in (0, -1e4, 1.0, 1e30, 10**400)),
        *(({"rope_parameters": {"rope_theta": value}}, "rope_theta") for value in (0.0, -5.0, 1e30)),
        *(({"rope_scaling": {"type": "linear", "factor": value}}, "factor") for value in (0, -2, 1e-30, 1e30, 10**400)),
        *(({"rope_scaling": JSON_YARN | {"attention_factor": value}}, "attention_factor") for value in (0, -1.0, 1e30)),
        *(({"rope_scaling": JSON_YARN | {"beta_fast": value}}, "beta_fast") for value in (0, -1, 0.5, 1e30)),
        *(({"rope_scaling": JSON_YARN | {"mscale": value, "mscale_all_dim": 1.0}}, "mscale") for value in (-1.0, 1e30)),
        ({"rope_scaling": JSON_YARN | {"factor": 9e4, "original_max_position_embeddings": 2**30}}, "factor 90000.0 times"),
        *(({"rope_scaling": LLAMA3 | {"low_freq_factor": value}}, "low_freq_factor") for value in (0, -1)),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1e30}}, "high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_numbers_of_json(keys: dict, said: str) -> None:
    with pytest.raises(fj.ModelFileError, match=rf"config\.json: .*{said}"):
        read(**keys)


def test_counts_of_experts_that_disagree() -> None:
    """num_experts and num_local_experts are two names of one field of transformers' class."""
    assert read("qwen3_moe", num_local_experts=8).config.num_experts == 8
    with pytest.raises(fj.ModelFileError, match="num_experts: is 8, but num_local_experts is 4"):
        read("qwen3_moe", num_local_experts=4)
