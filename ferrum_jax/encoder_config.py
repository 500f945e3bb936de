"""What an encoder (the BERT family) is, as one frozen value: from GGUF metadata, or from a directory's config.json and what
sentence-transformers keeps beside it.

As for decoders, a key that may change the computation and is neither read nor neutral is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ferrum_jax.config import EPS, Keys, config_architecture
from ferrum_jax.config_fields import FIELDS
from ferrum_jax.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from ferrum_jax.weights.tensor_info import TensorInfo

ARCHITECTURE = "bert"
MODEL_CLASS = "BertModel"
_POOLING_TYPES = {1: "mean", 2: "cls"}  # of GGUF
_POOLINGS = {"mean": {"mean", "mean_tokens"}, "cls": {"cls", "cls_token"}}  # of sentence-transformers, new and old


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shapes and constants of one encoder: post-norm layers, learned positions, GELU by the error function.

    `num_types` token types (segments) are known, all tokens of a text are of the first. `pooling` is "mean" or "cls".
    `context_length` is the number of positions, `text_length` the tokens that a text is cut to unless the caller chooses.
    `dtype` is the arithmetic of products with weights, as in `ModelConfig`.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    num_types: int
    context_length: int
    text_length: int
    layer_norm_eps: float
    pooling: str
    dtype: str = "float32"
    num_experts: ClassVar[int] = 0

    @property
    def layers(self) -> tuple[EncoderConfig, ...]:
        """What each layer is: all are as this says."""
        return (self,) * self.num_layers

    @property
    def activations(self) -> str:
        """The dtype in which activations reach matrix products."""
        return "float32" if self.dtype == "int8" else self.dtype


def encoder_from_gguf(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo], source: str) -> EncoderConfig | None:
    """The configuration of a file of arch `bert`, None for another one. Raises as `config_from_gguf`."""
    if config_architecture(metadata, source) != ARCHITECTURE:
        return None
    keys = Keys(metadata, ARCHITECTURE + ".", source)
    for name in ("token_embd.weight", "token_types.weight"):
        if name not in tensors:
            raise ModelFileError(f"{source}: tensor {name}: is missing")
    heads = keys.integer("attention.head_count", high=2**16)
    if keys.has("attention.head_count_kv") and keys.integer("attention.head_count_kv") != heads:
        raise keys.unsupported("attention.head_count_kv", "grouped queries are not supported")
    pooling = keys.integer("pooling_type", low=0) if keys.has("pooling_type") else 1
    if pooling not in _POOLING_TYPES:
        raise keys.unsupported("pooling_type", f"{pooling} is not supported; 1 (mean) and 2 (cls) are")
    context = keys.integer("context_length")
    config = EncoderConfig(
        architecture=ARCHITECTURE,
        num_layers=keys.integer("block_count", high=4096),
        hidden_size=_divisible(keys, "embedding_length", heads),
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=heads,
        vocab_size=tensors["token_embd.weight"].shape[0],
        num_types=tensors["token_types.weight"].shape[0],
        context_length=context,
        text_length=context,
        layer_norm_eps=keys.number("attention.layer_norm_epsilon", EPS),
        pooling=_POOLING_TYPES[pooling],
    )
    keys.asked.add("vocab_size")
    keys.refuse_unread("this feature is not supported")
    return config


def _divisible(keys: Keys, key: str, heads: int) -> int:
    hidden = keys.integer(key)
    if hidden % heads:
        raise keys.fail(key, f"is {hidden}, no multiple of {heads} heads")
    return hidden


# ---- directories


def is_encoder(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder."""
    names = content.get("architectures")
    return names == [MODEL_CLASS] or (names is None and content.get("model_type") == ARCHITECTURE)


def encoder_from_json(content: Mapping[str, Any], path: Path) -> EncoderConfig:
    """The configuration that config.json at `path` and the files beside it give."""
    for key, only in (("model_type", ARCHITECTURE), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if content.get(key, only) != only:
            raise UnsupportedModelError(f"{path}: key {key}: {content[key]!r} is not supported; supported: {only!r}")
    keys = Keys({key: value for key, value in content.items() if key in FIELDS[ARCHITECTURE]}, "", str(path))
    keys.asked.update(("hidden_act", "tie_word_embeddings"))
    heads = keys.integer("num_attention_heads", high=2**16)
    context = keys.integer("max_position_embeddings")
    pooling, text_length = _sentence_transformers(path.parent)
    config = EncoderConfig(
        architecture=ARCHITECTURE,
        num_layers=keys.integer("num_hidden_layers", high=4096),
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
    keys.refuse_unread(f"{{}} is not supported in a {MODEL_CLASS}")
    return config


def _sentence_transformers(directory: Path) -> tuple[str, int | None]:
    """The pooling ("mean" where nothing says) and the length that texts are cut to, or None."""
    from ferrum_jax.weights.json_file import parse_array, read_object, read_text

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
    length = length if type(length) is int and length >= 2 else None  # 10**30 stands for none
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
