"""Tiny random encoders of the BERT family, as a directory and as a GGUF file with the same weights, the same bytes on every
machine; and the texts that they embed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as T

from support import GOLDENS
from support.goldens.tiny_directories import safetensors, to_bytes
from support.goldens.tiny_models import bell, between

HERE = GOLDENS / "encoders"

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "Iron rusts.",
    "",
    "The colour of rust is red-brown; the iron's own is grey (東京)!",
    "NAÏVE cafés resmelt thé\tiron\u00a0ore\n[SEP] [mask] ☃ unknowable",
    "iron " * 19 + "ore",
    "a",
    "ore and iron and " * 12,
    "x" * 120,
]


@dataclass(frozen=True)
class Spec:
    """pooling: "cls", "mean", or "" if the directory does not have files of sentence-transformers (mean); plain_vocabulary:
    vocab.txt instead of tokenizer.json; text_length: max_seq_length of the directory, 0 for none."""

    name: str
    dtype: str = "F32"
    pooling: str = ""
    lowercase: bool = True
    plain_vocabulary: bool = False
    text_length: int = 0
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    ff: int = 160
    context: int = 64
    types: int = 2
    eps: float = 1e-12
    seed: int = 1


CASES = [
    Spec("mean-f32", seed=61),
    Spec("cls-f16", "F16", "cls", plain_vocabulary=True, text_length=24, seed=62),
    Spec("cased-bf16", "BF16", "mean", lowercase=False, heads=2, types=1, eps=0.01, seed=63),
]


def vocabulary(s: Spec) -> list[str]:
    """Specials, letters and marks alone and as continuations, some words and endings."""
    letters = "abcdefghijklmnopqrstuvwy" + ("" if s.lowercase else "TIRN")  # without x: long words stay unknown
    words = ["iron", "rust", "ore", "the", "and", "colour", "red", "brown", "of", "is", "##s", "##smelt", "un", "##know", "東"]
    words += [] if s.lowercase else ["The", "Iron", "##é"]
    return [*SPECIALS, *dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *".;'()!-", *words])]


def tensors(s: Spec) -> Iterator[tuple[str, str, np.ndarray]]:
    """(transformers' name, GGUF's name, float32 values)."""

    def norm(own: str, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
        yield f"{own}.weight", f"{name}.weight", between(s.seed, f"{name}.weight", (s.hidden,), 0.5, 1.5)
        yield f"{own}.bias", f"{name}.bias", between(s.seed, f"{name}.bias", (s.hidden,), -0.5, 0.5)

    def dense(own: str, name: str, rows: int, columns: int, gain: float) -> Iterator[tuple[str, str, np.ndarray]]:
        scale = np.float32(gain / columns**0.5)
        yield f"{own}.weight", f"{name}.weight", bell(s.seed, f"{name}.weight", (rows, columns)) * scale
        yield f"{own}.bias", f"{name}.bias", between(s.seed, f"{name}.bias", (rows,), -0.5, 0.5)

    for own, name, rows in (
        ("word_embeddings", "token_embd", len(vocabulary(s))),
        ("position_embeddings", "position_embd", s.context),
        ("token_type_embeddings", "token_types", s.types),
    ):
        yield f"embeddings.{own}.weight", f"{name}.weight", bell(s.seed, name, (rows, s.hidden))
    yield from norm("embeddings.LayerNorm", "token_embd_norm")
    for layer in range(s.layers):
        own, block = f"encoder.layer.{layer}", f"blk.{layer}"
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from dense(f"{own}.attention.self.{name}", f"{block}.attn_{letter}", s.hidden, s.hidden, 1.5)
        yield from dense(f"{own}.attention.output.dense", f"{block}.attn_output", s.hidden, s.hidden, 1.0)
        yield from norm(f"{own}.attention.output.LayerNorm", f"{block}.attn_output_norm")
        yield from dense(f"{own}.intermediate.dense", f"{block}.ffn_up", s.ff, s.hidden, 1.5)
        yield from dense(f"{own}.output.dense", f"{block}.ffn_down", s.hidden, s.ff, 1.0)
        yield from norm(f"{own}.output.LayerNorm", f"{block}.layer_output_norm")


def write_directory(s: Spec, path: Path) -> str:
    """Writes a checkpoint directory and returns the digest of its weights and vocabulary."""
    path.mkdir(parents=True, exist_ok=True)
    entries = [(own, s.dtype, values.shape, to_bytes(values, s.dtype)) for own, _, values in tensors(s)]
    pooler = bell(s.seed, "pooler", (s.hidden, s.hidden))
    entries.append(("pooler.dense.weight", s.dtype, pooler.shape, to_bytes(pooler, s.dtype)))
    entries.append(("pooler.dense.bias", s.dtype, (s.hidden,), to_bytes(pooler[0], s.dtype)))
    entries.append(("embeddings.position_ids", "I64", (1, s.context), np.arange(s.context).tobytes()))
    weights = safetensors(entries)
    (path / "model.safetensors").write_bytes(weights)

    def write(name: str, content: Any) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))

    write("config.json", {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": s.hidden, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "intermediate_size": s.ff, "vocab_size": len(vocabulary(s)), "hidden_act": "gelu",
        "max_position_embeddings": s.context, "type_vocab_size": s.types, "layer_norm_eps": s.eps, "pad_token_id": 0,
        "position_embedding_type": "absolute", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    })  # fmt: skip
    write("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": s.lowercase})
    if s.plain_vocabulary:
        (path / "vocab.txt").write_text("\n".join(vocabulary(s)) + "\n", encoding="utf-8")
    else:
        write("tokenizer.json", tokenizer_json(s))
    if s.pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        write("modules.json", [
            {"idx": i, "name": str(i), "path": at, "type": f"sentence_transformers.models.{kind}"}
            for i, (at, kind) in enumerate(kinds.items())
        ])  # fmt: skip
        modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
        write(
            "1_Pooling/config.json",
            {"word_embedding_dimension": s.hidden} | {key: kind == s.pooling for key, kind in modes.items()},
        )
    if s.text_length:
        write("sentence_bert_config.json", {"max_seq_length": s.text_length, "do_lower_case": False})
    return hashlib.sha256(weights + "\n".join(vocabulary(s)).encode()).hexdigest()


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values that the directory has."""
    kept = to_bytes(values, dtype)
    if dtype == "BF16":
        return (np.frombuffer(kept, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(values.shape)
    return np.frombuffer(kept, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(values.shape)


def tokenizer_json(s: Spec) -> dict[str, Any]:
    """As the tokenizers library saves a BERT tokenizer, with a truncation and a padding that are not to count."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ids = {token: i for i, token in enumerate(vocabulary(s))}
    template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    padding = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
        "padding": {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [{"id": ids[text], "content": text, "special": True, **flags} for text in SPECIALS],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": s.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": template, "pair": template,
            "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }  # fmt: skip


def write_gguf(
    s: Spec, path: Path, format: str = "", metadata: dict[str, Any] | None = None, dequantized: bool = False
) -> Path:
    """The same model as llama.cpp's converter writes it, matrices of layers in `format` (the directory's dtype by default).
    metadata: replaces keys (None drops one). dequantized: in F32, with the values of that format."""
    format = format or s.dtype
    writer = gguf.GGUFWriter(path, "bert")
    tokens = vocabulary(s)
    respelled = [t if t in SPECIALS else t[2:] if t.startswith("##") else "▁" + t for t in tokens]
    keys: dict[str, tuple[Any, T]] = {
        "bert.block_count": (s.layers, T.UINT32),
        "bert.context_length": (s.context, T.UINT32),
        "bert.embedding_length": (s.hidden, T.UINT32),
        "bert.feed_forward_length": (s.ff, T.UINT32),
        "bert.attention.head_count": (s.heads, T.UINT32),
        "bert.attention.layer_norm_epsilon": (s.eps, T.FLOAT32),
        "bert.attention.causal": (False, T.BOOL),
        "bert.pooling_type": (2 if s.pooling == "cls" else 1, T.UINT32),
        "tokenizer.ggml.model": ("bert", T.STRING),
        "tokenizer.ggml.token_type_count": (s.types, T.UINT32),
        "tokenizer.ggml.tokens": (respelled, T.ARRAY),
        "tokenizer.ggml.token_type": ([3 if t in SPECIALS else 1 for t in tokens], T.ARRAY),
        "tokenizer.ggml.unknown_token_id": (1, T.UINT32),
        "tokenizer.ggml.cls_token_id": (2, T.UINT32),
        "tokenizer.ggml.seperator_token_id": (3, T.UINT32),
        "tokenizer.ggml.padding_token_id": (0, T.UINT32),
        "tokenizer.ggml.mask_token_id": (4, T.UINT32),
    }
    for key, value in (metadata or {}).items():
        if value is None:
            del keys[key]
        else:
            keys[key] = (value, keys[key][1] if key in keys else T.get_type(value))
    for key, (value, kind) in keys.items():
        writer.add_key_value(key, value, kind, T.STRING if key == "tokenizer.ggml.tokens" else None)
    for _, name, values in tensors(s):
        small = values.ndim == 1 or name in ("position_embd.weight", "token_types.weight")
        kind = gguf.GGMLQuantizationType["F32" if small else format if values.shape[-1] % 32 == 0 else s.dtype]
        stored = gguf.quants.quantize(_rounded(values, s.dtype), kind)
        if dequantized:
            stored, kind = gguf.quants.dequantize(stored, kind).astype(np.float32), gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
