"""Opens the tokenizer of a checkpoint, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.json_file import read_object
from ferrum_jax.tokenizer.huggingface import DirectoryTokenizer
from ferrum_jax.tokenizer.library import LibraryTokenizer
from ferrum_jax.tokenizer.tokenizer import Tokenizer
from ferrum_jax.tokenizer.vocabulary import PREFIX
from ferrum_jax.tokenizer.wordpiece import WordPieceTokenizer


def tokenizer_of_gguf(metadata: Mapping[str, object], source: str = "") -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe: WordPiece (model "bert") or BPE. Raises like
    `Tokenizer.from_gguf`."""
    model = metadata.get(PREFIX + "model")
    kind = WordPieceTokenizer if isinstance(model, str) and model == "bert" else Tokenizer
    return kind.from_gguf(metadata, source)


def tokenizer_of_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, from tokenizer.json (for BERT also vocab.txt) and the files next to it.

    Raises ModelFileError, naming the file, if one is missing or inconsistent, and UnsupportedModelError for an unsupported
    kind.
    """
    made: LibraryTokenizer
    if not (directory / "tokenizer.json").exists() and (directory / "vocab.txt").exists():
        made = WordPieceTokenizer.from_vocabulary(directory)
    else:
        made = DirectoryTokenizer(directory)
    path = directory / "sentence_bert_config.json"
    made.lowercase = (read_object(path) or {}).get("do_lower_case") or False
    if not isinstance(made.lowercase, bool):
        raise ModelFileError(f"{path}: key do_lower_case: must be true or false, not {made.lowercase!r:.100}")
    return made
