"""Converts the tokenizer of a checkpoint directory to metadata of a GGUF file, with which llama.cpp encodes to the same ids.

llama.cpp selects pre-tokenizers by name and not by expression, so the name is found by trial: the one that cuts a text with
many scripts, digits and spaces as tokenizer.json does. A SentencePiece vocabulary is merged by score there and by rank here:
the negated rank of a token's merge is a score with the same order; that of Gemma 4 has its list of merges there, too. At the
end both tokenizers encode that text, and a difference is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.files.json_file import parse_object, read_text
from ferrum_jax.files.metadata import Typed
from ferrum_jax.tokenizer.bpe import splitter
from ferrum_jax.tokenizer.huggingface import DirectoryTokenizer
from ferrum_jax.tokenizer.pretokenizers import PRE_TOKENIZERS
from ferrum_jax.tokenizer.tokenizer import Tokenizer
from ferrum_jax.tokenizer.vocabulary import BYTE, PREFIX, TokenType

# Text on which pre-tokenizers differ: case, contractions, digits by one or three, marks, signs, scripts, spaces, line ends.
PROBE = (
    "Hello World, it's WE'LL don'T I'd you've HelloWORLDagain iPhone 0 12 345 6789 1234567 3.14159e-10 v2.0 x1y2\n"
    "\n\n  indented\t\ttabs \r\n   trailing   \n\n \n (a+b)*c == d->e; /* #!? */ http://a.b/c?d=e&f %$ @x_y __init__ \n"
    "grüße ça naïve Ωμέγα привет мир שלום مرحبا नमस्ते हिन्दी ไทย 東京は日本 中文字符 한국어 かな カナ ²³½ ٣٤ Ⅷ\n"
    "👍🏽 👨‍👩‍👧 ‘quoted’ …—– ！？。、\n"
    "    return [1,22,333,4444]  // done\n     \t \n!!!???... 's 'S 're"
)
# Control tokens of Gemma 4 that llama.cpp shows, because it reads calls of tools in the text.
_SHOWN = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
_FIRST = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-v3")


def tokenizer_metadata(directory: Path, vocab_size: int, vocabulary: str = "llama") -> dict[str, Typed]:
    """The `tokenizer.` keys for the files of a directory, padded with unused tokens to `vocab_size`. vocabulary: as of
    `Family`. Raises UnsupportedModelError if llama.cpp has no such tokenizer."""
    path = directory / "tokenizer.json"
    tokenizer = DirectoryTokenizer(directory)
    content = parse_object(read_text(path) or "", str(path))
    known = tokenizer._tokens[:vocab_size]  # tokens beyond the embedding cannot be in a GGUF file
    tokens = [token if token is not None else f"[PAD{i}]" for i, token in enumerate(known)]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    types = [*tokenizer._types[:vocab_size], *[int(TokenType.UNUSED)] * (vocab_size - len(known))]
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or tokenizer._kind not in ("bytes", "spaces"):
        raise UnsupportedModelError(f"{path}: a model of type {model.get('type')!r} cannot be written as GGUF")
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model.get("merges", ())]
    there = set(tokens)
    merges = [merge for merge in merges if {*merge, "".join(merge)} <= there]
    if tokenizer._kind == "bytes":
        keys = {
            "model": Typed("gpt2", "string"),
            "pre": Typed(_pre_tokenizer(tokenizer, bool(model.get("ignore_merges")), path), "string"),
            "merges": Typed([" ".join(merge) for merge in merges], "array string"),
        }
    else:
        types = [int(TokenType.BYTE) if BYTE.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)]
        keys = {
            "model": Typed(vocabulary, "string"),
            "scores": Typed(_scores(tokens, merges), "array float32"),
            "add_space_prefix": Typed(tokenizer.adds_space_prefix, "bool"),
        }
        if vocabulary == "gemma4":
            keys["merges"] = Typed([" ".join(merge) for merge in merges], "array string")
            shown = int(TokenType.USER_DEFINED)
            types = [shown if token in _SHOWN else kind for token, kind in zip(tokens, types, strict=True)]
    keys |= {"tokens": Typed(tokens, "array string"), "token_type": Typed(np.array(types, np.int32), "array int32")}
    unknown = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else None
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id, "unknown": unknown}
    keys |= {f"{name}_token_id": Typed(i, "uint32") for name, i in ids.items() if i is not None and i < vocab_size}
    plain, special = tokenizer.encode("a", add_special=False), tokenizer.encode("a", add_special=True)
    keys["add_bos_token"] = Typed(special[:1] == [tokenizer.bos_id] != plain[:1], "bool")
    keys["add_eos_token"] = Typed(special[-1:] == [tokenizer.eos_id] != plain[-1:], "bool")
    metadata = {PREFIX + key: entry for key, entry in keys.items()}
    named = dict(tokenizer.chat_templates)
    if default := named.pop("default", None):
        metadata["tokenizer.chat_template"] = Typed(default, "string")
    named = {re.sub("[^A-Za-z0-9]", "_", name): template for name, template in named.items()}  # as gguf-py spells them
    metadata |= {f"tokenizer.chat_template.{name}": Typed(template, "string") for name, template in named.items()}
    if named:
        metadata["tokenizer.chat_templates"] = Typed(sorted(named), "array string")
    made = Tokenizer.from_gguf({key: entry.value for key, entry in metadata.items()}, str(path))
    _compare(made, tokenizer, path)
    ends = sorted(end for end in tokenizer.eos_ids - made.eos_ids if end < vocab_size)
    for key, end in zip(("eot", "eom"), ends, strict=False):
        metadata[f"{PREFIX}{key}_token_id"] = Typed(end, "uint32")
    return metadata


def _pre_tokenizer(tokenizer: DirectoryTokenizer, ignore_merges: bool, path: Path) -> str:
    """The name of the pre-tokenizer that cuts PROBE like the library."""
    expected = [piece for piece, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)]
    for name in sorted(PRE_TOKENIZERS, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        pre = PRE_TOKENIZERS[name]
        if pre.ignore_merges == ignore_merges and [p for p, _ in splitter(pre).pre_tokenize_str(PROBE)] == expected:
            return name
    raise UnsupportedModelError(f"{path}: key pre_tokenizer: cuts text as no pre-tokenizer of llama.cpp does")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> np.ndarray:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return np.array([-ranks.get(token, len(merges)) for token in tokens], np.float32)


def _compare(made: Any, tokenizer: DirectoryTokenizer, path: Path) -> None:
    for add_special in (False, True):
        if made.encode(PROBE, add_special) != tokenizer.encode(PROBE, add_special):
            raise UnsupportedModelError(f"{path}: llama.cpp would encode texts with other ids than this tokenizer does")
