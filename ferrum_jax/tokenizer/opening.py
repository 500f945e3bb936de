"""Which kind of tokenizer a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ferrum_jax.tokenizer.huggingface import DirectoryTokenizer
from ferrum_jax.tokenizer.tokenizer import Tokenizer
from ferrum_jax.tokenizer.vocabulary import PREFIX
from ferrum_jax.tokenizer.wordpiece import WordPieceTokenizer


def tokenizer_of_gguf(metadata: Mapping[str, object], source: str = "") -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe: WordPiece (model "bert") or BPE. Raises as
    `Tokenizer.from_gguf`."""
    kind = WordPieceTokenizer if str(metadata.get(PREFIX + "model")) == "bert" else Tokenizer
    return kind.from_gguf(metadata, source)


def tokenizer_of_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, from tokenizer.json (of BERT: or vocab.txt) and the files beside it.

    Raises ModelFileError, naming the file, where one is missing or inconsistent, UnsupportedModelError for a kind that is
    not supported.
    """
    if not (directory / "tokenizer.json").exists() and (directory / "vocab.txt").exists():
        return WordPieceTokenizer.from_vocabulary(directory)
    return DirectoryTokenizer(directory)
