"""The tokenizer of a checkpoint directory: tokenizer.json, and the files next to it for special tokens.

The `tokenizers` library encodes. Everything else is read from the same JSON, so that bytes of tokens, end tokens and control
tokens work as for a GGUF file: a special token is read from a text only on request, and tokens known by their text end a
generation whatever the files say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.files.json_file import parse_object, read_object, read_text
from ferrum_jax.tokenizer.bpe import byte_values
from ferrum_jax.tokenizer.library import LibraryTokenizer
from ferrum_jax.tokenizer.spm import SPACE
from ferrum_jax.tokenizer.vocabulary import BYTE, SPECIAL_TYPES, TokenType, mend_types
from ferrum_jax.tokenizer.wordpiece import text_flags

_FLAGS = ("single_word", "lstrip", "rstrip", "special")
EXTRA_TEMPLATES = "additional_chat_templates"
_BERT_CLASSES = (None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
_SILENT = (TokenType.CONTROL, TokenType.UNKNOWN)


class DirectoryTokenizer(LibraryTokenizer):
    """The `Tokenizer` of a checkpoint directory. Raises ModelFileError or UnsupportedModelError naming the file."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokenizer.json"
        text = read_text(self._path)
        if text is None:
            raise ModelFileError(f"{self._path}: is missing; other forms of a tokenizer are not supported")
        content = parse_object(text, str(self._path))
        changed = self._add_elsewhere(content, directory)
        changed |= _follow_flags(content, directory)
        self._tokens, self._types = self._read_tokens(content)
        self._kind = self._kind_of(content)
        self.vocab_size = len(self._tokens)
        ids = {token: i for i, token in enumerate(self._tokens) if token is not None}
        files = _SpecialTokens(directory, ids, self.vocab_size)
        self.bos_id, self.eos_id, self.pad_id = files.bos_id, files.eos_id, files.pad_id
        self.eos_ids = mend_types(ids, self._types, files.eos_id) | files.end_ids
        for token in self.eos_ids:
            if self._types[token] == TokenType.NORMAL:
                self._types[token] = TokenType.CONTROL
        self.chat_templates = chat_templates(directory)
        self._use(self._build(content, None if changed else text))
        self._flags = {}
        if content.get("post_processor") is None:
            self._flags = {end: files.config.get(f"add_{end}_token") is True for end in ("bos", "eos")}

    # Reading

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {problem}")

    def _read_tokens(self, content: dict[str, Any]) -> tuple[list[str | None], list[int]]:
        """Tokens by id (None for a hole) and their types."""
        model = content.get("model")
        known = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(known, list):  # Unigram: [token, score]
            pairs = [(entry[0] if isinstance(entry, list) and entry else None, i) for i, entry in enumerate(known)]
        elif isinstance(known, dict):
            pairs = list(known.items())
        else:
            raise self._error("key model.vocab: is missing")
        added = content.get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
            raise self._error("key added_tokens: must be a list of objects")
        special = {entry.get("id"): entry.get("special") is True for entry in added}
        pairs += [(entry.get("content"), entry.get("id")) for entry in added]
        count = len(pairs)
        for token, i in pairs:
            if not isinstance(token, str) or type(i) is not int or not 0 <= i < 4 * count + 256:
                raise self._error(f"token {token!r} has the id {i!r}, which no vocabulary of {count} tokens has")
        tokens: list[str | None] = [None] * (1 + max((i for _, i in pairs), default=-1))
        for token, i in pairs:
            if tokens[i] not in (None, token):
                raise self._error(f"the id {i} is both {tokens[i]!r} and {token!r}")
            tokens[i] = token
        types = [int(TokenType.UNUSED if token is None else TokenType.NORMAL) for token in tokens]
        for i, silent in special.items():
            types[i] = TokenType.CONTROL if silent else TokenType.USER_DEFINED
        unknown = model.get("unk_token") if isinstance(model, dict) else None
        if isinstance(unknown, str) and unknown in tokens:
            types[tokens.index(unknown)] = TokenType.UNKNOWN
        return tokens, types

    def _kind_of(self, content: dict[str, Any]) -> str:
        """How tokens spell text: "bytes" (GPT-2's letters), "spaces" (SentencePiece) or "words"."""
        decoders = {part.get("type"): part for part in _parts(content.get("decoder"), "decoders")}
        before = [part.get("type") for part in _parts(content.get("pre_tokenizer"), "pretokenizers")]
        metaspace = decoders.get("Metaspace", {})
        scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
        self._drops_space = "Strip" in decoders or (bool(metaspace) and scheme != "never")
        if "ByteLevel" in decoders or (not decoders and "ByteLevel" in before):
            return "bytes"
        if {"Metaspace", "ByteFallback", "Replace"} & decoders.keys():
            return "spaces"
        if not decoders or "WordPiece" in decoders:
            self._drops_space = True
            self._goes_on = decoders.get("WordPiece", {}).get("prefix", "")
            return "words"
        raise UnsupportedModelError(f"{self._path}: key decoder: {', '.join(map(str, decoders))} is not supported")

    def _add_elsewhere(self, content: dict[str, Any], directory: Path) -> bool:
        """Adds the tokens that are only in added_tokens_decoder of tokenizer_config.json or, without that, in
        added_tokens.json. Returns whether there are any. As in transformers, an id is the next free one, whatever the files
        say."""
        path, key = directory / "tokenizer_config.json", "added_tokens_decoder"
        declared = (read_object(path) or {}).get(key)
        if declared is None:
            path, key = directory / "added_tokens.json", ""
            legacy = read_object(path) or {}
            declared = {str(i): {"content": token} for token, i in legacy.items()}
        entries = declared.items() if isinstance(declared, dict) else [("", declared)]
        for number, entry in entries:
            is_id = number.isdecimal() and len(number) < 10
            if not is_id or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise ModelFileError(f"{path}: {key and f'key {key}: '}must give tokens by their ids, not {entry!r:.100}")
        added, model = content.get("added_tokens") or [], content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(added, list) or not isinstance(vocab, dict | list):
            return False  # an error of tokenizer.json
        known = {str(entry.get("content")): entry for entry in added if isinstance(entry, dict)}
        pairs = enumerate(vocab) if isinstance(vocab, list) else ()  # Unigram: [token, score]
        ids = vocab if isinstance(vocab, dict) else {str(pair[0]): i for i, pair in pairs if isinstance(pair, list) and pair}
        taken = (entry.get("id") for entry in known.values())
        free = max([len(vocab), *(1 + i for i in taken if isinstance(i, int))])
        changed = False
        for _, entry in sorted(entries, key=lambda item: int(item[0])):
            token, flags = entry["content"], {name: entry.get(name) is True for name in _FLAGS}
            if token in known:
                if flags["special"] and known[token].get("special") is not True:
                    known[token]["special"] = changed = True
                continue
            flags["normalized"] = entry.get("normalized", not flags["special"]) is True
            added.append({"id": ids.get(token, free), "content": token, **flags})
            known[token] = added[-1]
            free += token not in ids
            changed = True
        content["added_tokens"] = added
        return changed

    def _build(self, content: dict[str, Any], text: str | None) -> Any:
        from tokenizers import Tokenizer as Library

        changed = False
        for entry in content.get("added_tokens") or ():
            silent = self._types[entry["id"]] in _SILENT
            changed |= entry.get("special") is not silent
            entry["special"] = silent
        try:
            made = Library.from_str(json.dumps(content) if changed or text is None else text)
            made.no_truncation()
            made.no_padding()
            made.encode("a b")
        except BaseException as error:  # the library's panics are not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise self._error(f"cannot be used: {error}") from None
        return made

    # The contract

    def encode_batch(self, texts: list[str], add_special: bool = True, parse_special: bool = False) -> list[list[int]]:
        """As `Tokenizer.encode_batch`."""
        encoded = super().encode_batch(texts, add_special and not self._flags, parse_special)
        begin, end = (
            [token] if add_special and self._flags.get(name) and token is not None else []
            for name, token in (("bos", self.bos_id), ("eos", self.eos_id))
        )
        return [begin + ids + end for ids in encoded]

    def _piece(self, token: int) -> bytes:
        text = self._tokens[token]
        if text is None:
            return b""
        if self._types[token] in SPECIAL_TYPES:
            if self._kind == "spaces" and self._types[token] == TokenType.USER_DEFINED:  # returned as the normalizer spells it
                text = self._tokenizer.id_to_token(token).replace(SPACE, " ")
            return text.encode(errors="replace")
        if self._kind == "bytes":
            letters = [byte_values().get(letter) for letter in text]
            return text.encode(errors="replace") if None in letters else bytes(b for b in letters if b is not None)
        if self._kind == "words":
            goes_on = self._goes_on and text.startswith(self._goes_on)
            return (text[len(self._goes_on) :] if goes_on else " " + text).encode(errors="replace")
        if byte := BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace(SPACE, " ").encode(errors="replace")

    def is_control(self, token: int) -> bool:
        """As `Tokenizer.is_control`."""
        self._check(token)
        return self._types[token] in _SILENT

    @property
    def adds_space_prefix(self) -> bool:
        """Whether `decode` removes a space at the beginning of a text."""
        return self._drops_space


class _SpecialTokens:
    """The special tokens according to tokenizer_config.json, special_tokens_map.json, config.json and
    generation_config.json."""

    def __init__(self, directory: Path, ids: dict[str, int], count: int) -> None:
        self.directory, self.ids, self.count = directory, ids, count
        self.config = read_object(directory / "tokenizer_config.json") or {}
        texts = (read_object(directory / "special_tokens_map.json") or {}) | self.config
        model = read_object(directory / "config.json") or {}
        generation = read_object(directory / "generation_config.json") or {}
        self.bos_id = self._token(texts, "bos")
        self.pad_id = self._token(texts, "pad")
        ends = self._numbers("generation_config.json", generation) + self._numbers("config.json", model)
        own = self._token(texts, "eos")
        self.eos_id = own if own is not None else next(iter(ends), None)
        self.end_ids = frozenset(ends if own is None else [own, *ends])

    def _token(self, texts: dict[str, Any], end: str) -> int | None:
        text = texts.get(f"{end}_token")
        if isinstance(text, dict):
            text = text.get("content")
        if text is None:
            return None
        if not isinstance(text, str) or (text not in self.ids and end != "pad"):
            raise ModelFileError(
                f"{self.directory / 'tokenizer_config.json'}: key {end}_token: {text!r} is not a token of the vocabulary"
            )
        return self.ids.get(text)

    def _numbers(self, name: str, content: dict[str, Any]) -> list[int]:
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for i in ids:
            if type(i) is not int:
                raise ModelFileError(f"{self.directory / name}: key eos_token_id: {i!r} is not a token id")
        return [i for i in ids if 0 <= i < self.count]  # an id beyond the vocabulary is never sampled


def _follow_flags(content: dict[str, Any], directory: Path) -> bool:
    """Applies the settings of tokenizer_config.json for case, accents and ideographs to the normalizer of a BERT vocabulary, as
    transformers does unless that file names a class for any tokenizer.json. Returns whether anything changed."""
    kind = (read_object(directory / "tokenizer_config.json") or {}).get("tokenizer_class")
    normalizer = content.get("normalizer")
    if kind not in _BERT_CLASSES or not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return False
    lowercase, accents, chinese = text_flags(directory)
    flags = {"lowercase": lowercase, "strip_accents": accents, "handle_chinese_chars": chinese}
    changed = any(normalizer.get(name) is not flag for name, flag in flags.items())
    normalizer.update(flags)
    return changed


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """A component, or those of a sequence."""
    if not isinstance(value, dict):
        return []
    if value.get("type") != "Sequence":
        return [value]
    parts = value.get(key)
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def chat_templates(directory: Path) -> dict[str, str]:
    """Chat templates by name: from tokenizer_config.json (one, or a list with names), chat_template.jinja (the default), and
    additional_chat_templates/NAME.jinja."""
    path = directory / "tokenizer_config.json"
    value = (read_object(path) or {}).get("chat_template")
    entries = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    found: dict[str, str] = {}
    for entry in entries:
        name, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(template, str):
            raise ModelFileError(f"{path}: key chat_template: must be a text, or a list of objects with name and template")
        found[name] = template
    for file in (directory / "chat_template.jinja", *sorted((directory / EXTRA_TEMPLATES).glob("*.jinja"))):
        if (text := read_text(file)) is not None:
            found[file.name.removesuffix(".jinja") if file.parent.name == EXTRA_TEMPLATES else "default"] = text
    return found
