"""WordPiece, the tokenizer of BERT (arXiv 1609.08144, section 4.1): from a GGUF vocabulary or from a vocab.txt.

The `tokenizers` library splits the text. GGUF files mark the beginning of a word ("▁iron"), BERT marks the continuation
("##on"), so their tokens are respelled. A GGUF file does not state whether text is lower-cased; but a vocabulary for
lower-cased text has no piece with a capital, and any other has some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ferrum_jax.errors import ModelFileError
from ferrum_jax.files.json_file import read_object, read_text
from ferrum_jax.tokenizer.library import LibraryTokenizer
from ferrum_jax.tokenizer.spm import SPACE
from ferrum_jax.tokenizer.vocabulary import PREFIX, _Keys, _read_tokens

_SPECIAL = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
_KEYS = {  # keys of GGUF, the older name first; "seperator" is how the format spells it
    **{"unk": ("unknown",), "cls": ("cls", "bos"), "sep": ("seperator", "eos")},
    **{"pad": ("padding",), "mask": ("mask",)},
}
_GOES_ON = "##"


class WordPieceTokenizer(LibraryTokenizer):
    """The `Tokenizer` of a BERT vocabulary. special: the texts of the tokens of `_SPECIAL`; lowercase, strip_accents (None: as
    lowercase) and chinese (every ideograph is a word): how a text is changed before it is split."""

    def __init__(
        self,
        tokens: Sequence[str],
        special: Mapping[str, str],
        where: str,
        *,
        lowercase: bool,
        strip_accents: bool | None = None,
        chinese: bool = True,
    ) -> None:
        from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Library

        self._tokens, self._ids = list(tokens), {token: i for i, token in enumerate(tokens)}
        if len(self._ids) != len(self._tokens):
            twice = next(token for i, token in enumerate(tokens) if self._ids[token] != i)
            raise ModelFileError(f"{where}: the token {twice!r} occurs twice")
        for name in ("unk", "cls", "sep"):
            if special[name] not in self._ids:
                raise ModelFileError(f"{where}: does not have the token {special[name]!r}, which a WordPiece tokenizer needs")
        self.vocab_size = len(self._tokens)
        self.chat_templates = {}
        self.bos_id, self.eos_id, self.pad_id = None, None, self._ids.get(special["pad"])
        self.eos_ids = frozenset()
        self._control = {self._ids[token] for token in special.values() if token in self._ids}
        made = Library(models.WordPiece(self._ids, unk_token=special["unk"], max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ends = [(special[name], self._ids[special[name]]) for name in ("sep", "cls")]
        made.post_processor = processors.BertProcessing(*ends)
        made.add_special_tokens([AddedToken(self._tokens[i], normalized=False) for i in sorted(self._control)])
        self._use(made)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], source: str = "") -> WordPieceTokenizer:
        """Made from the `tokenizer.ggml.` keys of a file whose model is "bert"."""
        keys = _Keys(metadata, source)
        stored, _ = _read_tokens(keys)
        tokens = [_respelled(token) for token in stored]
        special = dict(_SPECIAL)
        for name, names in _KEYS.items():
            found = next((i for key in names if (i := keys.token(key, len(tokens))) is not None), None)
            if found is not None:
                special[name] = tokens[found]
        lowercase = not any(re.search("[A-Z]", token) for token in tokens if not token.startswith("["))
        return cls(tokens, special, f"{keys.source}: {PREFIX}tokens", lowercase=lowercase)

    @classmethod
    def from_vocabulary(cls, directory: Path) -> WordPieceTokenizer:
        """Made from vocab.txt, one token per line, and tokenizer_config.json next to it."""
        path = directory / "vocab.txt"
        lines = (read_text(path) or "").split("\n")
        tokens = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        own, more = (read_object(directory / name) or {} for name in ("tokenizer_config.json", "special_tokens_map.json"))
        texts = more | own
        special = dict(_SPECIAL)
        for name in special:
            text = texts.get(f"{name}_token")
            text = text.get("content") if isinstance(text, dict) else text
            special[name] = text if isinstance(text, str) else special[name]
        lowercase, accents, chinese = text_flags(directory)
        return cls(tokens, special, str(path), lowercase=lowercase, strip_accents=accents, chinese=chinese)

    def _piece(self, token: int) -> bytes:
        text = self._tokens[token]
        word = text if token in self._control else " " + text
        return (text[len(_GOES_ON) :] if text.startswith(_GOES_ON) else word).encode(errors="replace")

    def is_control(self, token: int) -> bool:
        """As `Tokenizer.is_control`."""
        self._check(token)
        return token in self._control

    @property
    def adds_space_prefix(self) -> bool:
        """Whether `decode` removes a space at the beginning of a text."""
        return True


def text_flags(directory: Path) -> tuple[bool, bool | None, bool]:
    """`lowercase`, `strip_accents` and `chinese` as tokenizer_config.json says, by default as transformers' BertTokenizer."""
    path = directory / "tokenizer_config.json"
    config, flags = read_object(path) or {}, {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    lowercase, accents, chinese = (config.get(key, default) for key, default in flags.items())
    if not all(isinstance(flag, bool | None) for flag in (lowercase, accents, chinese)):
        raise ModelFileError(f"{path}: {', '.join(flags)} must be true or false")
    return bool(lowercase), accents, bool(chinese)


def _respelled(token: str) -> str:
    """BERT's spelling of a GGUF file's token; names in brackets are the same in both."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[1:] if token.startswith(SPACE) and len(token) > 1 else _GOES_ON + token
