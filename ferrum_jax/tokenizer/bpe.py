"""BPE by merges in the file's order: byte-level ("gpt2"), text -> words -> bytes written as letters -> merges; and of whole
lines of characters ("gemma4").

The `tokenizers` library merges; this module adds the file's pre-tokenizer before it and handles the cases in which the library
differs from llama.cpp: letters are those of Unicode 15.1, and bytes without a token (some vocabularies lack bytes that did not
occur in their training text) separate their neighbors and give no token.
"""

import re
from functools import cache
from typing import Any

from ferrum_jax.tokenizer.pretokenizers import PreTokenizer
from ferrum_jax.tokenizer.spm import SPACE
from ferrum_jax.tokenizer.vocabulary import Vocabulary


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's letter for each byte: printable Latin-1 characters are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def byte_values() -> dict[str, int]:
    """The byte that each of `byte_letters` stands for."""
    return {letter: byte for byte, letter in enumerate(byte_letters())}


# The characters that Unicode 16 added (and unassigned ones between them), whose categories the library has.
_UNICODE_16 = (
    r"\x{897}\x{1b4e}-\x{1b4f}\x{1b7f}\x{1c89}-\x{1c8a}\x{2427}-\x{2429}\x{31e4}-\x{31e5}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}"
    r"\x{105c0}-\x{105f3}\x{10d40}-\x{10d8f}\x{10ec2}-\x{10efc}\x{11380}-\x{113e2}\x{116d0}-\x{116e3}\x{11bc0}-\x{11bf9}"
    r"\x{11f5a}\x{13460}-\x{143fa}\x{16100}-\x{16139}\x{16d40}-\x{16d79}\x{18cff}\x{1cc00}-\x{1ceb3}\x{1e5d0}-\x{1e5ff}"
    r"\x{1f8b2}-\x{1f8c1}\x{1fa89}-\x{1fa8f}\x{1fabe}\x{1fac6}\x{1fadc}-\x{1fadf}\x{1fae9}\x{1fbcb}-\x{1fbef}"
)


def _dated(pattern: str) -> str:
    """The pattern with every category limited to the characters of Unicode 15.1."""
    return re.sub(r"\\p\{\w+\}", lambda category: f"[{category[0]}&&[^{_UNICODE_16}]]", pattern)


def splitter(pre: PreTokenizer) -> Any:
    """The library's form of a pre-tokenizer: words with their bytes written as letters."""
    from tokenizers import Regex, pre_tokenizers

    behaviors = ["merged_with_previous" if pre.glue_first else "isolated"] + ["isolated"] * len(pre.patterns)
    splits = [
        pre_tokenizers.Split(Regex(_dated(pattern)), behavior)
        for pattern, behavior in zip(pre.patterns, behaviors, strict=False)
    ]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class ByteLevelBPE:
    """Encodes text without special tokens; the ids are those of `vocabulary`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, models

        pre = vocabulary.pre
        assert pre is not None
        missing = [letter for letter in byte_letters() if letter not in vocabulary.ids]
        self._first_missing = len(vocabulary.tokens) if missing else None
        ids = vocabulary.ids | {letter: len(vocabulary.tokens) + i for i, letter in enumerate(missing)}
        self._tokenizer = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=pre.ignore_merges))
        self._tokenizer.pre_tokenizer = splitter(pre)

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._first_missing is not None:
            ids = [i for i in ids if i < self._first_missing]
        return ids


class CharacterBPE:
    """Encodes text without special tokens by merging characters. Spaces are U+2581 in the vocabulary, characters without a
    token are written as byte tokens, and a run of line ends that is a token is not merged."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, models

        self._ids = vocabulary.ids
        self._tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges, byte_fallback=True))

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for part in re.findall(r"\n+|[^\n]+", text.replace(" ", SPACE)):
            known = self._ids.get(part) if part[0] == "\n" else None
            out += self._tokenizer.encode(part, add_special_tokens=False).ids if known is None else [known]
        return out
