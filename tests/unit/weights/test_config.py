"""Metadata to configuration: what is refused by name, and what each scaling key means."""

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.loading import validate
from ferrum_jax.weights.gguf import open_gguf
from support.tiny_gguf import write_tiny_llama

T = gguf.GGUFValueType
NEEDED = [
    "general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
]  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(key, tmp_path):
    path = write_tiny_llama(tmp_path / "model.gguf", metadata={key: None})
    with pytest.raises(fj.ModelFileError, match=key.replace(".", r"\.")) as caught:
        validate(path)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (([True, False, True], T.ARRAY), (7, 0, 7)),
        ((2, T.UINT32), (7, 0, 7)),
        ((3, T.UINT32), (7, 7, 0)),
        ((1, T.UINT32), (0, 0, 0)),
        ((0, T.UINT32), (7, 7, 7)),
        (None, (7, 7, 7)),
    ],
)
def test_which_layers_have_the_window(pattern, windows, tmp_path):
    """A list, or a period as llama.cpp's architectures with a pattern read it: the last layer of each sees all."""
    metadata = {"llama.attention.sliding_window": (7, T.UINT32)}
    metadata |= {"llama.attention.sliding_window_pattern": pattern} if pattern else {}
    path = write_tiny_llama(tmp_path / "model.gguf", layers=3, metadata=metadata)
    with open_gguf(path) as file:
        config = file.config()
    assert tuple(spec.mixer.window for spec in config.layers) == windows
    length = 20
    ids = np.random.default_rng(1).integers(1, 60, length).tolist()
    model = fj.load(path, dtype="float32")
    (far,), (near,) = model.logits([ids]), model.logits([[ids[0] % 60 + 1, *ids[1:]]])
    assert model.config == config and np.array_equal(far[-1], near[-1]) == (windows == (7, 7, 7) and length > 3 * 6 + 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.causal", (False, T.BOOL)),
        ("llama.attention.scale", (1.0, T.FLOAT32)),
        ("llama.final_logit_softcapping", (30.0, T.FLOAT32)),
        ("llama.use_parallel_residual", (True, T.BOOL)),
        ("llama.nextn_predict_layers", (1, T.UINT32)),
        ("llama.logit_scale", (0.5, T.FLOAT32)),
        ("llama.rope.scaling.type", ("longrope", T.STRING)),
        ("llama.expert_gating_func", (2, T.UINT32)),
        ("llama.expert_shared_count", (1, T.UINT32)),
        ("llama.attention.value_length", (8, T.UINT32)),
        ("general.architecture", ("gpt2", T.STRING)),
    ],
)
def test_a_feature_that_is_not_there_is_named(key, value, tmp_path):
    path = write_tiny_llama(tmp_path / "model.gguf", metadata={key: value})
    with pytest.raises(fj.UnsupportedModelError, match=r"model\.gguf: "):
        validate(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.layer_norm_rms_epsilon", (float("nan"), T.FLOAT32)),
        ("llama.attention.head_count", ("four", T.STRING)),
        ("llama.attention.head_count", (3, T.UINT32)),
        ("llama.attention.head_count_kv", ([2, 2, 2], T.ARRAY)),
        ("llama.attention.sliding_window_pattern", ([True, False, True], T.ARRAY)),
        ("llama.attention.sliding_window_pattern", ([0, 2], T.ARRAY)),
        ("llama.attention.sliding_window_pattern", ("every", T.STRING)),
        ("llama.rope.scaling.type", ([1, 2], T.ARRAY)),
        ("llama.rope.dimension_count", (7, T.UINT32)),
        ("llama.vocab_size", ("many", T.STRING)),
        ("llama.block_count", (3, T.UINT32)),
        ("tokenizer.chat_template", ("{% for x in", T.STRING)),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named(key, value, tmp_path):
    path = write_tiny_llama(tmp_path / "model.gguf", metadata={key: value})
    with pytest.raises(fj.ModelFileError, match=r"model\.gguf"):
        validate(path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"head_count_kv": [2, 3]}, "head_count_kv: 3 of layer 1 does not divide attention.head_count 4"),
        ({"head_count": [4, 0]}, "head_count: the value of layer 1 is 0; it must be from 1 to 65536"),
        ({"head_count": [4, 4, 4]}, "head_count: has 3 values; it must have one for each of the 2 layers"),
        ({"head_count": [4.0, 4.0]}, r"head_count: the value of layer 0 must be an integer, not 4\.0"),
        (
            {"head_count": [4, 2], "key_length": None},
            "key_length: is missing, and attention.head_count differs from layer to layer",
        ),
        ({"head_count": [4, 8]}, r"tensor blk\.1\.attn_q\.weight"),
    ],
)
def test_a_number_of_a_layer_that_cannot_be_is_named(changes, error, tmp_path):
    metadata = {
        f"llama.attention.{key}": (value, T.ARRAY) if isinstance(value, list) else value for key, value in changes.items()
    }
    path = write_tiny_llama(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(fj.ModelFileError, match=rf"model\.gguf: .*{error}"):
        validate(path)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"factor": 4.0}, ("linear", 4.0, 1.0)),
        ({"type": "linear", "factor": 4.0, "attn_factor": 2.0}, ("linear", 4.0, 2.0)),
        ({"type": "none", "factor": 4.0}, None),
        ({"attn_factor": 2.0}, ("linear", 1.0, 2.0)),
    ],
    ids=str,
)
def test_rope_scaling(keys, expected, tmp_path):
    kinds = {str: T.STRING, float: T.FLOAT32}
    metadata = {f"llama.rope.scaling.{key}": (value, kinds[type(value)]) for key, value in keys.items()}
    with open_gguf(write_tiny_llama(tmp_path / "model.gguf", metadata=metadata)) as file:
        scaling = file.config().rope_scaling
    assert (None if scaling is None else (scaling.kind, scaling.factor, scaling.attention_factor)) == expected


def test_vectors_that_no_model_has_are_refused(tmp_path):
    for name, values in (
        ("output_norm.weight", np.full(64, np.nan)),
        ("rope_freqs.weight", np.zeros(8)),
        ("rope_freqs.weight", np.full(8, 1e-30)),
    ):
        path = write_tiny_llama(tmp_path / "model.gguf", tensors={name: values.astype(np.float32)})
        with pytest.raises(fj.ModelFileError, match=f"model.gguf: tensor {name}"):
            fj.load(path)
