"""`Tokenizer`: text to ids and back, from a GGUF file's metadata alone, with llama.cpp's ids.

Special tokens are found in the raw text first, the longest first over the whole text; the text between them goes to the BPE of
the file. Nothing is normalized.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from ferrum_jax import checks
from ferrum_jax.errors import ModelFileError
from ferrum_jax.tokenizer.bpe import ByteLevelBPE, CharacterBPE, byte_values
from ferrum_jax.tokenizer.spm import SPACE, SentencePieceBPE
from ferrum_jax.tokenizer.vocabulary import SPECIAL_TYPES, TokenType, Vocabulary, read_vocabulary

_TEMPLATE = "tokenizer.chat_template"
_WHITESPACE = " \t\n\v\f\r"
_SILENT = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})


def named_templates(metadata: Mapping[str, object], source: str = "") -> dict[str, str]:
    """The chat templates of a file by name. Raises ModelFileError for one that is not a string."""
    names = metadata.get(_TEMPLATE + "s", [])  # the names that the file lists; the keys themselves decide
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFileError(f"{source or 'model'}: {_TEMPLATE}s: must be an array of strings")
    found = {}
    for key, template in metadata.items():
        if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
            if not isinstance(template, str):
                raise ModelFileError(f"{source or 'model'}: {key}: must be a string, not {type(template).__name__}")
            found[key[len(_TEMPLATE) + 1 :] or "default"] = template
    return found


def check_text(text: str) -> None:
    """Raises ValueError if the value is not a text, or contains half of a surrogate pair, which UTF-8 cannot represent."""
    try:
        checks.text(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text: character {error.start} is an unpaired surrogate") from None


class Tokenizer:
    """Converts text to token ids and back. This class reads the BPE of a GGUF file; other kinds derive from it (opening.py).

    Attributes:
      vocab_size (int): the number of tokens.
      bos_id (int | None): the token that begins a text.
      eos_id (int | None): the end token that the file names.
      pad_id (int | None): the padding token.
      eos_ids (frozenset[int]): all tokens that end a generation.
      chat_templates (dict[str, str]): the chat templates by name.
      chat_template (str | None): the template with the name "default"; it can be set.
    """

    chat_templates: dict[str, str]

    def __init__(self, vocabulary: Vocabulary, chat_templates: Mapping[str, str] = {}) -> None:
        self._vocabulary = vocabulary
        kinds: dict[str, Any] = {"gpt2": ByteLevelBPE, "llama": SentencePieceBPE, "gemma4": CharacterBPE}
        self._bpe = kinds[vocabulary.model](vocabulary)
        self._is_spm = vocabulary.pre is None
        special = [i for i, kind in enumerate(vocabulary.types) if kind in SPECIAL_TYPES]
        special.sort(key=lambda i: -len(vocabulary.tokens[i].encode()))
        self._special = [(i, vocabulary.tokens[i], vocabulary.types[i] in _SILENT) for i in special]
        self.chat_templates = dict(chat_templates)
        self.vocab_size = len(vocabulary.tokens)
        self.eos_ids = vocabulary.end_ids
        self.bos_id, self.eos_id, self.pad_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], source: str = "") -> "Tokenizer":
        """Builds the tokenizer of a file.

        Args:
            metadata: keys and values as in the GGUF header (str, int, bool, float, list[str], numpy arrays).
            source: name of the file, for errors.

        Raises:
            ModelFileError: a key is missing or inconsistent; the message names it.
            UnsupportedModelError: the tokenizer model or the pre-tokenizer is unknown; the message names it.
        """
        return cls(read_vocabulary(metadata, source), named_templates(metadata, source))

    @property
    def chat_template(self) -> str | None:
        """The default template, or None. It can be set."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.chat_templates = {**self.chat_templates, "default": template}

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
          text: the text.
          add_special: add BOS before and EOS after the text if the file (or its kind of tokenizer) says so.
          parse_special: read the texts of control tokens as those tokens and not as plain text. User-defined tokens are always
            read as tokens.

        Raises:
          ValueError: if the text is not a str, or contains half of a surrogate pair, which UTF-8 cannot represent.
        """
        check_text(text)
        vocabulary = self._vocabulary
        prefix = " " if vocabulary.add_space_prefix else ""
        out: list[int] = []
        if add_special and vocabulary.add_bos and vocabulary.bos_id is not None:
            out.append(vocabulary.bos_id)
        after_special = True
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                out.append(part)
            else:
                out += self._bpe.encode(prefix + part if after_special else part)
            after_special = isinstance(part, int)
        if add_special and vocabulary.add_eos and vocabulary.eos_id is not None:
            out.append(vocabulary.eos_id)
        return out

    def encode_batch(self, texts: list[str], add_special: bool = True, parse_special: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, add_special, parse_special) for text in checks.texts(texts)]

    def _parts(self, text: str, parse_special: bool) -> list[int | str]:
        """The text as ids of special tokens and the raw texts between them."""
        parts: list[int | str] = [text] if text else []
        for token, special, is_silent in self._special:
            if (is_silent and not parse_special) or special not in text:
                continue
            strip_left = token in self._vocabulary.strip_left
            strip_right = token in self._vocabulary.strip_right
            cut: list[int | str] = []
            for part in parts:
                if isinstance(part, int) or special not in part:
                    cut.append(part)
                    continue
                at = 0
                while (found := part.find(special, at)) >= 0:
                    raw = part[at:found].rstrip(_WHITESPACE) if strip_left else part[at:found]
                    cut += [raw, token] if raw else [token]
                    at = found + len(special)
                    while strip_right and at < len(part) and part[at] in _WHITESPACE:
                        at += 1
                if at < len(part):
                    cut.append(part[at:])
            parts = cut
        return parts

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; for a control token, its name. A character can consist of several tokens.

        Args:
          token: an id.

        Raises:
          ValueError: if the id is outside the vocabulary.
        """
        found = self._pieces.get(token) if isinstance(token, int) else None
        if found is None:
            self._check(token)
            found = self._pieces[token] = self._piece(token)
        return found

    @functools.cached_property
    def _pieces(self) -> dict[int, bytes]:
        """The results of `token_bytes`."""
        return {}

    def _piece(self, token: int) -> bytes:
        text, kind = self._vocabulary.tokens[token], self._vocabulary.types[token]
        if kind in SPECIAL_TYPES:
            return text.encode()
        if kind in (TokenType.UNUSED, TokenType.UNDEFINED):
            return b""
        if not self._is_spm:
            try:
                return bytes([byte_values()[letter] for letter in text])
            except KeyError:  # it is not written in byte letters
                return text.encode()
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        return text.replace(SPACE, " ").encode()

    def is_control(self, token: int) -> bool:
        """Whether the token does not stand for text: a control token or the unknown token."""
        self._check(token)
        return self._vocabulary.types[token] in _SILENT

    @property
    def adds_space_prefix(self) -> bool:
        """Whether `encode` adds a space before a text, which `decode` removes again."""
        return self._vocabulary.add_space_prefix

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids. Bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: token ids.
          skip_special: leave out control tokens instead of writing their names.

        Raises:
          ValueError: if an id is outside the vocabulary.
        """
        from ferrum_jax.tokenizer.stream import TextStream

        stream = TextStream(self, skip_special)
        return "".join([stream.push(token) for token in checks.token_ids(ids)]) + stream.flush()

    def __repr__(self) -> str:
        kind = "chat template" if self.chat_template else "no chat template"
        return f"<{type(self).__name__} of {self.vocab_size:,} tokens, {kind}>"

    def _check(self, token: int) -> None:
        checks.token_ids([token])
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
