"""BERT (arXiv 1810.04805) as an encoder of sentences, with what sentence-transformers keeps next to a config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrum_jax.config import MOST_LAYERS, EncoderConfig
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.family import ConfigFile, Family, embedding_rows
from ferrum_jax.families.fields import FIELDS
from ferrum_jax.families.keys import EPS, Keys, shown
from ferrum_jax.families.table import Table, Tensor

if TYPE_CHECKING:
    from ferrum_jax.files.tensor_info import TensorInfo

_POOLING_TYPES = {1: "mean", 2: "cls"}  # of GGUF
_POOLINGS = {"mean": {"mean", "mean_tokens"}, "cls": {"cls", "cls_token"}}  # the keys of sentence-transformers, new and old


def _from_gguf(family: Family, keys: Keys, tensors: Mapping[str, TensorInfo]) -> EncoderConfig:
    vocab_size, num_types = (embedding_rows(keys, tensors, f"{name}.weight") for name in ("token_embd", "token_types"))
    heads = keys.integer("attention.head_count", high=2**16)
    if keys.has("attention.head_count_kv") and keys.integer("attention.head_count_kv") != heads:
        raise keys.unsupported("attention.head_count_kv", "grouped queries are not supported")
    pooling = keys.integer("pooling_type", low=0) if keys.has("pooling_type") else 1
    if pooling not in _POOLING_TYPES:
        raise keys.unsupported("pooling_type", f"{pooling} is not supported; 1 (mean) and 2 (cls) are")
    keys.ignore("vocab_size")
    context = keys.integer("context_length")
    return EncoderConfig(
        architecture=family.architecture,
        num_layers=keys.integer("block_count", high=MOST_LAYERS),
        hidden_size=_divisible(keys, "embedding_length", heads),
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=heads,
        vocab_size=vocab_size,
        num_types=num_types,
        context_length=context,
        text_length=context,
        layer_norm_eps=keys.number("attention.layer_norm_epsilon", EPS),
        pooling=_POOLING_TYPES[pooling],
    )


def _divisible(keys: Keys, key: str, heads: int) -> int:
    hidden = keys.integer(key)
    if hidden % heads:
        raise keys.fail(key, f"is {hidden}, not a multiple of {heads} heads")
    return hidden


def _from_json(family: Family, keys: Keys, path: Path) -> ConfigFile:
    """Reads config.json and the files of sentence-transformers next to it."""
    for key, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if keys.has(key) and (value := keys.get(key)) != only:
            raise keys.unsupported(key, f"{shown(value)} is not supported; supported: {only!r}")
    keys.ignore("tie_word_embeddings")
    heads = keys.integer("num_attention_heads", high=2**16)
    context = keys.integer("max_position_embeddings")
    pooling, text_length = _sentence_transformers(path.parent)
    config = EncoderConfig(
        architecture=family.architecture,
        num_layers=keys.integer("num_hidden_layers", high=MOST_LAYERS),
        hidden_size=_divisible(keys, "hidden_size", heads),
        intermediate_size=keys.integer("intermediate_size"),
        num_heads=heads,
        vocab_size=keys.integer("vocab_size"),
        num_types=keys.integer("type_vocab_size") if keys.has("type_vocab_size") else 2,
        context_length=context,
        text_length=min(context, text_length or context),
        layer_norm_eps=keys.number("layer_norm_eps", EPS) if keys.has("layer_norm_eps") else 1e-12,
        pooling=pooling,
    )
    return ConfigFile(family, config, True, frozenset(family.tensors.biased(always=True)))


def _sentence_transformers(directory: Path) -> tuple[str, int | None]:
    """The pooling ("mean" if it is not stated) and the length that texts are cut to, or None."""
    from ferrum_jax.files.json_file import parse_array, read_object, read_text

    pooling = "1_Pooling"
    if (text := read_text(directory / "modules.json")) is not None:
        modules = parse_array(text, str(directory / "modules.json"))
        listed = [module for module in modules if isinstance(module, dict)]
        kinds = {str(module.get("type")).rpartition(".")[2]: module.get("path") for module in listed}
        if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
            raise UnsupportedModelError(f"{directory / 'modules.json'}: a module {unknown[0]} is not supported")
        if isinstance(named := kinds.get("Pooling"), str):
            if not re.fullmatch(r"\w[\w.-]*", named) or not (directory / named / "config.json").is_file():
                raise ModelFileError(f"{directory / 'modules.json'}: {named}/config.json, which says how to pool, is missing")
            pooling = named
    path = directory / "sentence_bert_config.json"
    keys = Keys(read_object(path) or {}, "", str(path))
    length = (read_object(directory / "tokenizer_config.json") or {}).get("model_max_length")
    length = length if type(length) is int and length >= 2 else None  # 10**30 stands for "no limit"
    length = keys.integer("max_seq_length", low=2) if keys.has("max_seq_length") else length
    path = directory / pooling / "config.json"
    return _pooling(path, read_object(path)), length


def _pooling(path: Path, content: Mapping[str, Any] | None) -> str:
    if content is None:
        return "mean"
    modes = {key.removeprefix("pooling_mode_") for key, value in content.items() if value is True}
    modes = {str(content["pooling_mode"])} if "pooling_mode" in content else modes - {"include_prompt"}
    found = next((name for name, spellings in _POOLINGS.items() if modes & spellings == modes), None)
    if not modes or found is None:
        chosen = " and ".join(sorted(modes)) or "none"
        raise UnsupportedModelError(f"{path}: key pooling_mode: {chosen} is not supported; mean or cls alone is")
    return found


def _with_bias(stem: str, path: tuple[str, ...], axes: tuple[str, ...], module: str) -> tuple[Tensor, Tensor]:
    bias = (*path[:-1], f"{path[-1]}_bias")
    return Tensor(f"{stem}.weight", path, axes, (module,)), Tensor(f"{stem}.bias", bias, axes[:1], (module,))


def _embedding(name: str, parameter: str, axis: str, module: str, quantize: bool = True) -> Tensor:
    return Tensor(f"{name}.weight", (parameter,), (axis, "hidden"), (f"embeddings.{module}",), quantize=quantize)


def _sizes(config: EncoderConfig, spec: EncoderConfig | None) -> dict[str, int | tuple[int, int]]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": (config.num_heads, config.hidden_size // config.num_heads),
        "width": config.intermediate_size,
        "position": config.context_length,
        "type": config.num_types,
    }


BERT = Family(
    architecture="bert",
    model_class="BertModel",
    model_type="bert",
    fields=FIELDS["bert"] | {"position_embedding_type"},  # a key of earlier versions of transformers
    from_gguf=_from_gguf,
    from_json=_from_json,
    embeds=True,
    tensors=Table(
        (
            _embedding("token_embd", "embedding", "vocab", "word_embeddings"),
            _embedding("position_embd", "positions", "position", "position_embeddings", quantize=False),
            _embedding("token_types", "types", "type", "token_type_embeddings", quantize=False),
            *_with_bias("token_embd_norm", ("embedding_norm",), ("hidden",), "embeddings.LayerNorm"),
        ),
        (
            *_with_bias("attn_q", ("attention", "query"), ("heads", "hidden"), "attention.self.query"),
            *_with_bias("attn_k", ("attention", "key"), ("heads", "hidden"), "attention.self.key"),
            *_with_bias("attn_v", ("attention", "value"), ("heads", "hidden"), "attention.self.value"),
            *_with_bias("attn_output", ("attention", "output"), ("hidden", "heads"), "attention.output.dense"),
            *_with_bias("attn_output_norm", ("attention_norm",), ("hidden",), "attention.output.LayerNorm"),
            *_with_bias("ffn_up", ("feed_forward", "up"), ("width", "hidden"), "intermediate.dense"),
            *_with_bias("ffn_down", ("feed_forward", "down"), ("hidden", "width"), "output.dense"),
            *_with_bias("layer_output_norm", ("feed_forward_norm",), ("hidden",), "output.LayerNorm"),
        ),
        prefix="encoder.layer.",
        ignored=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
    ),
    sizes=_sizes,
)
