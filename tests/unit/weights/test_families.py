"""Families: an invented one is added as docs/architecture/families.md describes; tables and keys are compared with
gguf-py's."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import families
from ferrum_jax.convert import convert
from ferrum_jax.families import FAMILIES, Family
from ferrum_jax.families.family import ConfigFile
from ferrum_jax.families.fields import FIELDS
from ferrum_jax.families.glm4moe import GLM4_MOE
from ferrum_jax.families.gpt_oss import GPT_OSS
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.lfm2 import LFM2_MOE
from ferrum_jax.families.table import Part
from ferrum_jax.families.tensors import is_dense
from ferrum_jax.files.metadata import Typed, plain
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.loading import validate
from ferrum_jax.weights.gguf import GGUFFile
from support import ROOT
from support.directories import SMALL, write
from support.goldens.tiny_directories import Spec
from support.tiny_gguf import write_tiny_llama

IDS = [[3, 9, 4, 1, 5, 9, 2, 6]]


# ---- the recipe: Qwen3 under another name, with the base of its rotation in thousands


def of_the_recipe() -> Family:
    """The object that the page makes."""
    page = (ROOT / "docs" / "architecture" / "families.md").read_text()
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(textwrap.dedent(block), names)
    return names["NEW"]


BASE = of_the_recipe()


def from_gguf(family: Family, keys: Keys, tensors: Mapping[str, TensorInfo]):
    return BASE.from_gguf(family, keys, tensors, theta=1000 * keys.number("rope.kilobase"))


def from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    return BASE.from_json(family, keys, path, theta=1000 * keys.number("rope_kilobase"))


def to_gguf(config: fj.ModelConfig, where: str) -> dict[str, Typed]:
    keys = BASE.to_gguf(config, where)
    theta, kind = keys.pop("new.rope.freq_base")
    return keys | {"new.rope.kilobase": Typed(theta / 1000, kind)}


FIELDS_OF_CLASS = FIELDS["qwen3"] | {"rope_kilobase"}
NEW = dataclasses.replace(BASE, fields=FIELDS_OF_CLASS, from_gguf=from_gguf, from_json=from_json, to_gguf=to_gguf)
NAMES = {"architectures": ["NewForCausalLM"], "model_type": "new", "rope_theta": None, "rope_kilobase": 10.0}
SPEC = Spec("new", "Qwen3ForCausalLM", **SMALL)


@pytest.mark.slow
def test_a_family_is_added_by_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fj.load(write(SPEC, tmp_path / "qwen3"), dtype="float32").logits(IDS)[0]
    directory = write(SPEC, tmp_path / "new", NAMES)
    with pytest.raises(fj.UnsupportedModelError, match="NewForCausalLM is not supported"):
        fj.load(directory)
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, NEW))
    file = convert(directory, tmp_path / "model.gguf", to="gguf")
    assert "new.rope.kilobase" in gguf.GGUFReader(file).fields
    for path in (directory, file, convert(directory, tmp_path / "orbax", to="orbax")):
        model = fj.load(path, dtype="float32")
        assert model.config.architecture == "new" and model.config.rope_theta == 10_000.0
        assert np.array_equal(model.logits(IDS)[0], expected)


def test_keys_of_a_new_family_are_judged_as_those_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, NEW))
    with pytest.raises(fj.ModelFileError, match=r"config\.json: key rope_kilobase: is missing"):
        validate(write(SPEC, tmp_path / "none", NAMES | {"rope_kilobase": None}))
    stride = write(SPEC, tmp_path / "stride", NAMES | {"decoder_stride": 3})
    validate(stride)  # not a field of the class
    more = dataclasses.replace(NEW, fields=FIELDS_OF_CLASS | {"decoder_stride"})
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, more))
    with pytest.raises(fj.UnsupportedModelError, match=r"key decoder_stride: 3 is not supported in a NewForCausalLM"):
        validate(stride)


# ---- what holds of all families

ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_names_of_tensors_are_those_of_the_converter(family: Family) -> None:
    """gguf-py's map gives each module of a directory the name that the table gives it. Of experts it has them merged."""
    known = gguf.get_tensor_name_map(ARCHITECTURES[family.architecture], 3)
    for prefix, rows, block in (("", family.tensors.whole, ""), (f"{family.tensors.prefix}2.", family.tensors.layer, "blk.2.")):
        for row in rows:
            for module in (getattr(module, "tensor", module) for module in row.modules if not isinstance(module, Part)):
                if family.model_type in ("qwen3_moe", "qwen3_next") and row.layers is is_dense:
                    continue  # llama.cpp's Qwen3-MoE and Qwen3-Next have no dense layers
                if module.endswith(("in_proj_qkvz.weight", "kv_b_proj.weight", "_bias")):
                    continue  # which the converter cuts or calls otherwise before it looks
                if family.model_type == "lfm2_moe" and ("experts" in module or module == "lm_head"):
                    continue  # which the converter merges under another name, or which its models do not have
                if family.architecture == "gemma4" and ("experts" in module or module.endswith("scale")):
                    continue  # of which gguf-py has gates and up projections as one tensor, and no scales
                name = f"{prefix}{module}".replace(".*", "").replace("language_model.", "").removesuffix(".weight")
                assert known.get_name(name) == f"{block}{row.name.rpartition('.')[0] or row.name}"


def has(family: Family, name: str) -> bool:
    return family.tensors.find(f"blk.0.{name}")[0] is not None


@pytest.mark.parametrize(
    "family",
    [
        f
        for f in FAMILIES
        if f.to_gguf and not has(f, "ssm_a") and not has(f, "attn_k_b.weight") and "gemma" not in f.model_type
    ],
    ids=lambda family: family.model_type,
)
def test_keys_come_back(family: Family) -> None:
    """What is written as GGUF is read as the same configuration, and every key is one of llama.cpp's. (For models with gated
    delta nets see model/test_hybrids.py, for those with latent vectors model/test_latent.py, for Gemma model/test_gemma.py.)"""
    experts = {"num_experts": 8, "experts_per_token": 2, "expert_intermediate_size": 32, "norm_topk_prob": True}
    of_feed_forward = experts if re.search("mix|moe|oss", family.model_type) else {"intermediate_size": 96}
    if family in (GLM4_MOE, LFM2_MOE):
        of_feed_forward |= {"router_scoring": "sigmoid", "router_eps": 1e-6, "dense_layers": [0], "intermediate_size": 96}
    if family is GLM4_MOE:
        of_feed_forward |= {"expert_groups": 4, "expert_groups_used": 2, "expert_group_best": 2, "router_eps": 1e-20}
        of_feed_forward |= {"expert_weights_scale": 2.5, "shared_expert_size": 64}
    config = fj.ModelConfig(
        architecture=family.architecture, num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=320, context_length=512, rms_norm_eps=2.0**-17, rope_theta=5e5, rope_dim=16, sliding_window=32,
        **of_feed_forward, rope_scaling=fj.config.RopeScaling("yarn", 4.0, 128, 1.0, 16.0, 2.0),
    )  # fmt: skip
    if family is GPT_OSS:
        config = dataclasses.replace(config, attention_sinks=True, swiglu_limit=7.0, swiglu_alpha=1.702)
        scaling = dataclasses.replace(config.rope_scaling, truncate=False)
        config = dataclasses.replace(config.with_by_layer(sliding_window=(32, 0, 32)), rope_scaling=scaling)
    keys = plain(family.to_gguf(config, "somewhere"))
    groups = [vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type)]
    listed = {str(key).replace("{arch}", family.architecture) for group in groups for key in group}
    assert keys.keys() <= listed
    embedding = TensorInfo("token_embd.weight", "F32", (320, 64), Path("x.gguf"), 0, 0)
    metadata = keys | {"general.architecture": family.architecture}
    read = GGUFFile((Path("x.gguf"),), metadata, {"token_embd.weight": embedding}, {}).config()
    (wanted, found) = (dataclasses.replace(c, rope_scaling=None) for c in (config, read))
    assert found == wanted and abs(read.rope_scaling.attention_factor - 1.0) <= 1e-6
    one = {"attention_factor": 1.0}
    assert dataclasses.replace(read.rope_scaling, **one) == dataclasses.replace(config.rope_scaling, **one)


def test_rows_of_llama_are_those_of_the_converter(tmp_path: Path) -> None:
    """llama.cpp's converter puts the rows of each head [2, half] as [half, 2]; parameters have them as they were."""
    heads, width = 4, 16
    matrix = np.random.default_rng(0).standard_normal((heads * width, 64)).astype(np.float32)
    permuted = matrix.reshape(heads, 2, width // 2, 64).swapaxes(1, 2).reshape(matrix.shape)
    tensors = {"blk.0.attn_q.weight": permuted}
    path = write_tiny_llama(
        tmp_path / "m.gguf", hidden=64, layers=1, heads=heads, head_dim=width, tensors=tensors, tensor_type="F32"
    )
    query = fj.load(path, dtype="float32").params["layers"]["attention"]["query"]
    assert np.array_equal(np.asarray(query.stacks["F32"].planes[0])[0], matrix)


def test_nothing_outside_asks_which_family_it_is() -> None:
    kinds = "EncoderConfig|ModelConfig|GGUFFile|OrbaxCheckpoint|HuggingFaceDirectory"
    asked = re.compile(rf"architecture\w*\)? (==|!=|in|not in) |isinstance\([^()]*({kinds})")
    for path in (ROOT / "ferrum_jax").rglob("*.py"):
        if path.parent.name != "families":
            assert not asked.search(path.read_text()), path
