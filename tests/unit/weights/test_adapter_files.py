"""Adapter directories: what is refused by name, what is read as by PEFT, and damaged copies.

Both ways to use an adapter, next to the weights and merged, begin with `read_adapter`; a few cases go through `fj.load`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import FerrumError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.opening import open_model
from support.adapter_directories import CASES, CONFIG, TENSORS, Folder
from support.directories import LLAMA, MOE, edit, edit_tensors
from support.directories import write as write_directory
from support.goldens import tiny_adapters, tiny_directories
from unit.weights.test_directory_fuzz import mutate

PLAIN = tiny_adapters.Spec("adapter", LLAMA, rank=4)
MODEL = "base_model.model.model."
QUERY = MODEL + "layers.0.self_attn.q_proj.lora_"
A, B = QUERY + "A.weight", QUERY + "B.weight"
MUTANTS = 600


def config_of(path: Path) -> fj.config.ModelConfig:
    with open_model(path) as source:
        return source.config()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_directory(LLAMA, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def config(model: Path):
    return config_of(model)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny_adapters.write(PLAIN, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(adapter: Path, config, said: str, kind: type[FerrumError] = ModelFileError) -> None:
    """With exactly this kind of error, which names the directory or a file in it."""
    with pytest.raises(kind, match=said) as caught:
        read_adapter(adapter, config)
    assert type(caught.value) is kind and str(adapter) in str(caught.value)


# ---- files


def test_files_that_are_missing(adapter: Path, config, model: Path) -> None:
    nowhere = adapter.with_name("nowhere")
    refused(nowhere, config, r"nowhere: an adapter is a directory with adapter_config\.json", ModelNotFoundError)
    refused(adapter / TENSORS, config, "an adapter is a directory", ModelNotFoundError)
    for option in ({"adapters": {"it": nowhere}}, {"merge_adapter": nowhere}):
        with pytest.raises(ModelNotFoundError, match="nowhere"):
            fj.load(model, **option)
    (adapter / TENSORS).rename(adapter / "kept")
    refused(adapter, config, r"adapter_model\.safetensors: is missing")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(adapter, config, r"adapter_model\.bin: is pickled, which is unsafe", UnsupportedModelError)
    (adapter / TENSORS).mkdir()
    refused(adapter, config, r"adapter_model\.safetensors: this is a directory")
    (adapter / TENSORS).rmdir()
    (adapter / "kept").rename(adapter / TENSORS)
    read_adapter(adapter, config)
    (adapter / CONFIG).unlink()
    refused(adapter, config, r"adapter_config\.json: is missing")
    refused(model, config, r"adapter_config\.json: is missing")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (CONFIG, b"{", "is not valid JSON"),
        (CONFIG, b"[]", "must be a JSON object"),
        (CONFIG, b'{"r": 8, "r": 4}', "key 'r' appears twice"),
        (CONFIG, b'{"peft_type": "LORA", "r": NaN}', "NaN is not JSON"),
        (CONFIG, b"\xff", "not valid UTF-8"),
        (TENSORS, b"", "the file is empty"),
        (TENSORS, b"version https://git-lfs.github.com/spec/v1", "a git-LFS pointer"),
        (TENSORS, b"\x80\x02}q\x00.", "a pickled PyTorch checkpoint"),
        (TENSORS, (1 << 40).to_bytes(8, "little") + b"{}", "the header claims 1099511627776 bytes"),
        (TENSORS, tiny_directories.safetensors([]), "has no tensor"),
    ],
)
def test_files_of_something_else(file: str, content: bytes, said: str, adapter: Path, config) -> None:
    (adapter / file).write_bytes(content)
    refused(adapter, config, said)


def test_a_file_that_is_cut_off(adapter: Path, config) -> None:
    whole = (adapter / TENSORS).read_bytes()
    (adapter / TENSORS).write_bytes(whole[:-1])
    refused(adapter, config, "it is truncated")
    (adapter / TENSORS).write_bytes(whole + b"\0")
    refused(adapter, config, "it is damaged")


# ---- adapter_config.json


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "IA3"}, "key peft_type: 'IA3' is not supported; supported: 'LORA'"),
        ({"peft_type": None}, "key peft_type: None"),
        ({"use_dora": True}, "key use_dora: True is not supported"),
        ({"use_qalora": True}, "key use_qalora"),
        ({"lora_bias": True}, "key lora_bias"),
        ({"modules_to_save": ["lm_head"]}, r"key modules_to_save: \['lm_head'\]"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "key layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "key trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "key alora_invocation_tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "key use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "key arrow_config"),
        ({"kasa_config": {"beta": 1e-4}}, "key kasa_config"),
        ({"megatron_config": {"a": 1}}, "key megatron_config"),
        ({"something_new": "x"}, "key something_new: 'x' is not supported"),
        ({"bias": "lora_only"}, "key bias: 'lora_only' is not supported: biases"),
        ({"bias": "all"}, "key bias: 'all'"),
        ({"init_lora_weights": "pissa"}, "key init_lora_weights: 'pissa' changes the base model's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "key init_lora_weights: 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "key init_lora_weights: 'olora'"),
        ({"init_lora_weights": "corda"}, "key init_lora_weights: 'corda'"),
        ({"init_lora_weights": "loftq"}, "key init_lora_weights: 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "key init_lora_weights: 'lora_ga'"),
        ({"rank_pattern": {".*q_proj": 4}}, r"key rank_pattern: '\.\*q_proj' is not a module name"),
        ({"alpha_pattern": {"q_proj|k_proj": 4}}, r"key alpha_pattern: 'q_proj\|k_proj' is not a module name"),
    ],
)
def test_what_is_not_supported(keys: dict, said: str, adapter: Path, config) -> None:
    edit(adapter / CONFIG, lambda content: content.update(keys))
    refused(adapter, config, rf"adapter_config\.json: {said}", UnsupportedModelError)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"r": 0}, "key r: a rank must be a positive integer, not 0"),
        ({"r": True}, "key r: a rank"),
        ({"r": 4.0}, r"key r: a rank must be a positive integer, not 4\.0"),
        ({"r": None}, "key r: .* not None"),
        ({"r": 8}, r"module model\.layers\.0\.\S+ has rank 8 by the keys r and rank_pattern; its tensors have rank 4"),
        ({"rank_pattern": {"q_proj": 8}}, r"module model\.layers\.0\.self_attn\.q_proj has rank 8 by"),
        ({"rank_pattern": {"q_proj": -1}}, "key rank_pattern: a rank must be a positive integer, not -1"),
        ({"rank_pattern": ["q_proj"]}, "key rank_pattern: must be an object"),
        ({"alpha_pattern": 3}, "key alpha_pattern: must be an object"),
        ({"alpha_pattern": {"q_proj": "16"}}, "key alpha_pattern: alpha must be a number of sane size, not '16'"),
        ({"lora_alpha": None}, "key lora_alpha: alpha must be a number"),
        ({"lora_alpha": True}, "key lora_alpha: alpha must be a number"),
        ({"lora_alpha": 10**400}, "key lora_alpha: alpha must be a number of sane size, not 1000"),
        ({"lora_alpha": 1e300}, "key lora_alpha: alpha must be a number of sane size"),
        ({"use_rslora": "yes"}, "key use_rslora: must be true or false"),
    ],
)
def test_settings_that_are_wrong(keys: dict, said: str, adapter: Path, config) -> None:
    edit(adapter / CONFIG, lambda content: content.update(keys))
    refused(adapter, config, said)


@pytest.mark.parametrize(
    "keys",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"exclude_modules": "lm_head", "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj)).*?"},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
        {"lora_ga_config": {"direction": "ArB2r"}, "corda_config": {"corda_method": "kpm"}, "eva_config": {"rho": 2.0}},
        {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None, "modules_to_save": []},
        {"merge_weights": False, "enable_lora": None, "fan_in_fan_out": True, "ensure_weight_tying": True},
    ],
)
def test_settings_that_say_nothing_of_the_weights(keys: dict, adapter: Path, config) -> None:
    want = read_adapter(adapter, config)
    edit(adapter / CONFIG, lambda content: content.update(keys))
    found = read_adapter(adapter, config)
    assert found.digest == want.digest and found.factors.keys() == want.factors.keys()


def test_what_a_directory_is_told_by(adapter: Path, config) -> None:
    """The digest depends on everything that the numbers depend on."""
    digests = {read_adapter(adapter, config).digest}
    for keys in ({"lora_alpha": 17}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}):
        edit(adapter / CONFIG, lambda content, keys=keys: content.update(keys))
        digests.add(read_adapter(adapter, config).digest)
    edit_tensors(adapter / TENSORS, lambda t: t.update({A: ("F32", (4, 64), bytes(1024))}))
    digests.add(read_adapter(adapter, config).digest)
    assert len(digests) == 5


# ---- tensors


def f32(*shape: int, value: float = 0.5) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, np.full(shape, value, np.float32).tobytes()


def renamed(tensors: dict, old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(A), r"module model\.layers\.0\.self_attn\.q_proj has no lora_A"),
        (lambda t: t.pop(B), r"module model\.layers\.0\.self_attn\.q_proj has no lora_B"),
        (lambda t: t.update({A: f32(3, 64)}), r"module model\.layers\.0\.self_attn\.q_proj: lora_A has rank 3, lora_B 4"),
        (lambda t: t.update({A: f32(4, 65)}), r"lora_A\.weight: shape \[4, 65\] does not fit this model: \[rank, 64\]"),
        (lambda t: t.update({B: f32(63, 4)}), r"lora_B\.weight: shape \[63, 4\] does not fit this model: \[64, rank\]"),
        (lambda t: t.update({A: f32(64)}), r"lora_A\.weight: shape \[64\] does not fit"),
        (lambda t: t.update({A: f32(4, 64, 1)}), r"lora_A\.weight: shape \[4, 64, 1\] does not fit"),
        (lambda t: t.update({A: f32(0, 64)}), r"lora_A\.weight: shape \[0, 64\] does not fit"),
        (lambda t: t.update({A: f32(4, 64, value=np.nan)}), r"lora_A\.weight: holds values that are not finite"),
        (lambda t: t.update({B: f32(64, 4, value=-np.inf)}), r"lora_B\.weight: holds values that are not finite"),
        (lambda t: t.update({B: f32(64, 4, value=3e38)}), r"q_proj: lora_B times alpha 16 / rank is beyond float32"),
        (lambda t: renamed(t, "layers.0", "layers.1"), r"layers\.1\.\S+ does not fit this model, which has 1 layers"),
    ],
)
def test_tensors_that_do_not_fit(change, said: str, adapter: Path, config) -> None:
    edit_tensors(adapter / TENSORS, change)
    refused(adapter, config, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({A: ("I32", (4, 64), bytes(1024))}), r"lora_A\.weight: dtype I32 is not supported"),
        (lambda t: t.update({A: ("F64", (4, 64), bytes(2048))}), r"lora_A\.weight: dtype F64 is not supported"),
        (lambda t: renamed(t, "layers.0", "layers.00"), r"layers\.00\.\S+ is not supported; LoRA is applied to the proj"),
        (lambda t: renamed(t, "q_proj", "qkv_proj"), r"qkv_proj\.lora_A\.weight: is not supported"),
        (lambda t: renamed(t, "base_model.model.", ""), r"tensor model\.layers\.0\.\S+ is not supported"),
        (lambda t: t.update({QUERY + "magnitude_vector": f32(64)}), r"q_proj\.lora_magnitude_vector: is not supported"),
        (lambda t: t.update({QUERY + "B.bias": f32(64)}), r"q_proj\.lora_B\.bias: is not supported"),
        (lambda t: t.update({MODEL + "layers.0.self_attn.q_proj.bias": f32(64)}), r"q_proj\.bias: is not supported"),
        (lambda t: t.update({MODEL + "embed_tokens.lora_embedding_A": f32(4, 320)}), r"lora_embedding_A: is not supported"),
        (lambda t: t.update({MODEL + "embed_tokens.weight": f32(320, 64)}), r"embed_tokens\.weight: is not supported"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": f32(4, 64)}), r"lm_head\.lora_A\.weight: is not"),
        (lambda t: t.update({MODEL + "layers.0.input_layernorm.lora_A.weight": f32(4, 64)}), r"input_layernorm\.\S+ is not"),
    ],
)
def test_tensors_that_are_not_supported(change, said: str, adapter: Path, config) -> None:
    edit_tensors(adapter / TENSORS, change)
    refused(adapter, config, said, UnsupportedModelError)


COPIES = {MODEL + "embed_tokens.weight": "model.embed_tokens.weight", "base_model.model.lm_head.weight": "lm_head.weight"}


def with_copies(adapter: Path, base: Path, change=lambda raw: raw, dtype: str = "BF16") -> Path:
    """Copies of the base's embedding and output as PEFT's save_embedding_layers writes them, after a resize by itself."""
    kept: dict = {}
    edit_tensors(base / "model.safetensors", kept.update)

    def add(tensors: dict) -> None:
        for name, own in COPIES.items():
            entry = kept.get(own, kept["model.embed_tokens.weight"])
            values = tiny_directories.from_bytes(entry[2], entry[0])
            tensors[name] = change((dtype, entry[1], tiny_directories.to_bytes(values, dtype)))

    edit_tensors(adapter / TENSORS, add)
    return adapter


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_the_models_own_matrices_is_passed_over(tied: bool, dtype: str, adapter: Path, tmp_path: Path) -> None:
    """Equal copies change nothing: applied and merged, the numbers are those of the adapter without them."""
    base = write_directory(dataclasses.replace(LLAMA, tied=tied), tmp_path / "base")
    for option in (lambda: {"adapters": {"it": adapter}}, lambda: {"merge_adapter": adapter}):
        name = {"adapter": "it"} if "adapters" in option() else {}
        before = fj.load(base, dtype="float32", **option()).logits([[5, 6, 7]], **name)
        with_copies(adapter, base, dtype=dtype)
        after = fj.load(base, dtype="float32", **option()).logits([[5, 6, 7]], **name)
        assert (before[0] == after[0]).all()
        edit_tensors(adapter / TENSORS, lambda t: [t.pop(copy) for copy in COPIES])


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: (*entry[:2], entry[2][:-2] + bytes([entry[2][-2] ^ 1]) + entry[2][-1:]),
        lambda entry: (entry[0], (321, 64), entry[2] + bytes(128)),
        lambda entry: (entry[0], (319, 64), entry[2][:-128]),
        lambda entry: ("F16", entry[1], entry[2]),
    ],
    ids=["one bit", "a row more", "a row less", "other dtype"],
)
def test_a_copy_that_differs_is_refused_by_name(change, adapter: Path, model: Path) -> None:
    with_copies(adapter, model, change)
    for keep in COPIES:
        edit_tensors(adapter / TENSORS, lambda t, keep=keep: [t.pop(copy) for copy in COPIES if copy != keep])
        for option in ({"adapters": {"it": adapter}}, {"merge_adapter": adapter}):
            with pytest.raises(
                UnsupportedModelError, match=rf"adapter_model\.safetensors: tensor {keep}: .*differs from the model's"
            ):
                fj.load(model, **option)
        edit_tensors(adapter / TENSORS, lambda t: [t.pop(copy, None) for copy in COPIES])
        with_copies(adapter, model, change)


def test_modules_saved_whole_are_passed_over_where_they_are_equal_copies(adapter: Path, model: Path) -> None:
    """PEFT's modules_to_save writes the embedding and the output under the same names; any other module is refused."""
    want = fj.load(model, dtype="float32", adapters={"it": adapter}).logits([[5, 6, 7]], adapter="it")
    with_copies(adapter, model)
    for saved in (["lm_head"], ["embed_tokens", "model.lm_head"]):
        edit(adapter / CONFIG, lambda content, saved=saved: content.update(modules_to_save=saved))
        found = fj.load(model, dtype="float32", adapters={"it": adapter}).logits([[5, 6, 7]], adapter="it")
        assert (found[0] == want[0]).all()
    for saved in (["lm_head", "norm"], ["head"], "lm_head", [1]):
        edit(adapter / CONFIG, lambda content, saved=saved: content.update(modules_to_save=saved))
        with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json: key modules_to_save: .* is not supported"):
            fj.load(model, adapters={"it": adapter})


def test_a_copy_beside_blocks_cannot_be_compared(adapter: Path, model: Path, tmp_path: Path) -> None:
    from ferrum_jax.convert import convert

    blocks = convert(model, tmp_path / "blocks.gguf", to="gguf", quantize="q8_0")
    with_copies(adapter, model)
    with pytest.raises(UnsupportedModelError, match=r"which is Q8_0 and cannot be compared"):
        fj.load(blocks, adapters={"it": adapter})
    fj.load(model, quantize="q8_0", adapters={"it": adapter})


@pytest.mark.parametrize(
    ("module", "said", "kind"),
    [
        ("mlp.gate_proj", r"gate_proj\.lora_A\.weight: does not fit this model: layer 0 is a mixture", ModelFileError),
        ("mlp.gate", r"mlp\.gate\.lora_A\.weight: is not supported", UnsupportedModelError),
        ("mlp.experts.0.up_proj", r"experts\.0\.up_proj\.lora_A\.weight: is not supported", UnsupportedModelError),
        ("mlp.experts", r"key target_parameters: \[\] does not say which parameters .*mlp\.experts are of", ModelFileError),
        ("mlp.experts.base_layer", r"key target_parameters: \[\] does not say which parameters", ModelFileError),
    ],
)
def test_parts_of_a_mixture(module: str, said: str, kind: type[FerrumError], tmp_path: Path) -> None:
    config = config_of(write_directory(MOE, tmp_path / "model"))
    adapter = tmp_path / "adapter"
    tiny_adapters.write(tiny_adapters.Spec("adapter", MOE, ("q_proj",)), adapter)
    read_adapter(adapter, config)
    name = f"{MODEL}layers.0.{module}.lora_A.weight"
    edit_tensors(adapter / TENSORS, lambda t: t.update({name: f32(8, 64)}))
    refused(adapter, config, said, kind)


def test_adapters_of_other_models(tmp_path: Path, model: Path) -> None:
    folder = Folder(tmp_path)
    for case in CASES.values():
        for option in ({"adapters": {"it": folder(case)}}, {"merge_adapter": folder(case)}):
            with pytest.raises(
                ModelFileError, match=rf"{case.name}/adapter_model\.safetensors: tensor \S+: .*does not fit this"
            ):
                fj.load(model, **option)


def test_an_embedding_model_has_no_adapters(tmp_path: Path) -> None:
    from support.goldens import tiny_encoders  # writes checkpoints of the BERT family

    spec = tiny_encoders.Spec("encoder")
    tiny_encoders.write_directory(spec, tmp_path / "encoder")
    tiny_adapters.write(PLAIN, tmp_path / "adapter")
    for option in ({"adapters": {"it": tmp_path / "adapter"}}, {"merge_adapter": tmp_path / "adapter"}):
        with pytest.raises(UnsupportedModelError, match="encoder"):
            fj.load(tmp_path / "encoder", **option)


def test_a_checkpoint_without_the_matrix(adapter: Path, tmp_path: Path) -> None:
    """The damage is the checkpoint's, and so is the error."""
    path = write_directory(LLAMA, tmp_path / "damaged")
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(path / "model.safetensors", lambda t: t.pop(name))
    for option in ({}, {"merge_adapter": adapter}, {"adapters": {"it": adapter}}):
        with pytest.raises(ModelFileError, match=rf"damaged: tensor {name}: is missing"):
            fj.load(path, **option)


# ---- damaged copies


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_mutants_are_refused_or_sound(file: str, tmp_path: Path, config) -> None:
    """Only our own errors are raised, and an accepted adapter is finite and fits."""
    spec = dataclasses.replace(
        PLAIN, rank_pattern={"q_proj": 3}, alpha_pattern={"^model.layers.0.mlp.up_proj": 2.5}, modules=("q_proj", "up_proj")
    )
    tiny_adapters.write(spec, tmp_path / "sound")
    raw = (tmp_path / "sound" / file).read_bytes()
    header = len(raw) if file == CONFIG else 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "mutant"
    shutil.copytree(tmp_path / "sound", path)
    num_refused = 0
    for index in range(MUTANTS):
        end = len(raw) if index % 8 == 0 else header
        (path / file).write_bytes(mutate(raw, end, random.Random(index)))
        try:
            found = read_adapter(path, config)
        except FerrumError as error:
            assert "mutant" in str(error)
            num_refused += 1
        except BaseException as error:
            error.add_note(f"mutant {index} of {file}")
            raise
        else:
            for (layer, _), (a, b) in found.factors.items():
                assert layer == 0 and a.shape[0] == b.shape[1] and np.isfinite(a).all() and np.isfinite(b).all()
    assert MUTANTS // 4 <= num_refused <= MUTANTS * 39 // 40


def test_numbers_of_a_config_survive_json(adapter: Path, config) -> None:
    """Whatever Python's JSON reads as a number, the largest integers too."""
    for text in ("1" + "0" * 5000, "-" + "9" * 4000, "1e-400", "-0.0", "123456789" * 40):
        content = json.dumps({**json.loads((adapter / CONFIG).read_text()), "lora_alpha": 0}).replace(
            '"lora_alpha": 0', f'"lora_alpha": {text}'
        )
        (adapter / CONFIG).write_text(content)
        try:
            read_adapter(adapter, config)
        except ModelFileError as error:
            assert "adapter_config.json" in str(error)
        else:
            assert float(text) == 0.0
        (adapter / CONFIG).write_text(content.replace(text, "16"))
