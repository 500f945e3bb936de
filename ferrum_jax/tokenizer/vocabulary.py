"""The vocabulary of a GGUF file, checked, with its special tokens as llama.cpp understands them.

The file states a type for each token, but files have errors: llama.cpp corrects the types of tokens that it recognizes by their
text (a chat model's `<|im_end|>` is a control token whatever the file says) and collects the tokens that end a generation from
both the keys and the texts. The same corrections are made once, here, so that all other code can trust the types.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.tokenizer.pretokenizers import PreTokenizer, pre_tokenizer

PREFIX = "tokenizer.ggml."
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` of the GGUF specification."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED})

# Texts of tokens that end a generation wherever they appear.
_END_TEXTS = (
    *(
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
        "<eos>",
        "[EOS]",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
    ),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "[e~["),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
)
# Tokens of fill-in-the-middle models: key, texts of the token where the key is absent (of several the first by id), whether
# it ends a generation.
_FILL_TOKENS: tuple[tuple[str, str, bool], ...] = (
    (
        "fim_pre",
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> ▁<PRE> <PRE> <|code_prefix|> <|prefix|>",
        False,
    ),
    (
        "fim_suf",
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> ▁<SUF> <SUF> <|code_suffix|> <|suffix|>",
        False,
    ),
    (
        "fim_mid",
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> ▁<MID> <MID> <|code_middle|> <|middle|>",
        False,
    ),
    ("fim_pad", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]", True),
    ("fim_rep", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>", True),
    ("fim_sep", "<|file_sep|>", True),
)
_CHANNEL_TEXTS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their properties; `pre` is for byte-level BPE alone, `merges` and `scores` depend on the model.

    `strip_left` and `strip_right` are the special tokens that absorb the whitespace before or after them.
    """

    source: str
    model: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    pre: PreTokenizer | None
    merges: list[tuple[str, str]]
    scores: list[float]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strip_left: frozenset[int]
    strip_right: frozenset[int]


class _Keys:
    """Typed reading of the `tokenizer.ggml.` keys; every error names the file and the key."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self.metadata, self.source = metadata, source or "model"

    def error(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {PREFIX}{key}: {message}")

    def raw(self, key: str) -> object:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise self.error(key, "the key is missing, and the tokenizer needs it")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.raw(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise self.error(key, "must be an array of strings")
        return value

    def numbers(self, key: str, count: int, kind: str) -> np.ndarray:
        array = np.asarray(self.raw(key))
        if array.ndim != 1 or (array.size and array.dtype.kind not in kind):
            raise self.error(key, f"must be an array of {'floats' if kind == 'f' else 'integers'}")
        if array.size != count:
            raise self.error(key, f"has {array.size} entries, but tokenizer.ggml.tokens has {count}")
        return array

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw(key) if default is None else self.metadata.get(PREFIX + key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"must be a bool, not {type(value).__name__}")
        return bool(value)

    def token(self, key: str, count: int, default: int | None = None) -> int | None:
        """The id under `<key>_token_id`. As in llama.cpp, an id beyond the vocabulary counts as absent, with a warning; a
        default beyond it is None."""
        value = self.metadata.get(f"{PREFIX}{key}_token_id")
        if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= count:
            message = f"is {value}, outside the vocabulary of {count} tokens, and is ignored"
            warnings.warn(str(self.error(f"{key}_token_id", message)), stacklevel=2)
            value = None
        if value is None:
            return default if default is not None and default < count else None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.error(f"{key}_token_id", f"must be an integer, not {type(value).__name__}")
        if value < 0:
            raise self.error(f"{key}_token_id", f"is {value}, outside the vocabulary of {count} tokens")
        return int(value)


def _read_tokens(keys: _Keys) -> tuple[list[str], dict[str, int]]:
    """Tokens by id, and ids by text. As in llama.cpp, the text ends at a NUL and is never empty."""
    tokens = keys.strings("tokens")
    if not tokens:
        raise keys.error("tokens", "is empty")
    names = tokens
    if "" in tokens or "\0" in "".join(tokens):
        names = [text.partition("\0")[0] or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        tokens = [text or name for text, name in zip(tokens, names, strict=True)]
    ids = {name: i for i, name in enumerate(names)}
    if len(ids) != len(names):
        first = next(i for i, name in enumerate(names) if ids[name] != i)
        raise keys.error("tokens", f"{names[first]!r} is both token {first} and token {ids[names[first]]}")
    return tokens, ids


def _read_merges(keys: _Keys, ids: dict[str, int]) -> list[tuple[str, str]]:
    lines = keys.strings("merges")
    merges = [(line[: (cut := line.find(" ", 1))], line[cut + 1 :]) for line in lines]
    for rank, (left, right) in enumerate(merges):
        if left in ids and right in ids and left + right in ids:
            continue
        if len(left) + len(right) + 1 != len(lines[rank]) or not right:
            raise keys.error("merges", f"entry {rank}, {lines[rank]!r}, must be two tokens separated by a space")
        unknown = next(text for text in (left, right, left + right) if text not in ids)
        raise keys.error("merges", f"entry {rank}, {lines[rank]!r}, names {unknown!r}, which is not in the vocabulary")
    return list(dict.fromkeys(merges))  # the first of equal entries counts


def _correct_types(keys: _Keys, ids: dict[str, int], types: list[int], eos: int | None) -> frozenset[int]:
    """Corrects `types` of the tokens known by text; returns the ids that end a generation."""
    ends: set[int] = set()
    for key, texts, is_end in _FILL_TOKENS:
        token = keys.token(key, len(types))
        if token is None:
            token = min((ids[text] for text in texts.split() if text in ids), default=None)
            if token is not None:
                types[token] = TokenType.CONTROL
        if token is not None and is_end:
            ends.add(token)
    for text in _END_TEXTS:
        if text in ids:
            types[ids[text]] = TokenType.CONTROL
            ends.add(ids[text])
    for text in _CHANNEL_TEXTS:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED
    ends |= {i for i in (eos, keys.token("eot", len(types)), keys.token("eom", len(types))) if i is not None}

    def has(*texts: str) -> bool:
        return all(ids.get(text) in ends for text in texts)

    # Models whose answers have parts: a token that ends other models' answers only ends a part.
    if has("<|end|>") and (has("<|return|>", "<|call|>") or has("<|calls|>", "<|flush|>")):
        ends.remove(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if has("<|tool_response>", "</s>"):
        ends.remove(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    return frozenset(ends)


def mend_types(ids: dict[str, int], types: list[int], eos: int | None) -> frozenset[int]:
    """The corrected `types` and the ids that end a generation, for a vocabulary that states only its own eos."""
    return _correct_types(_Keys({}, ""), ids, types, eos)


def _stripping(name: str, pre: str, ids: dict[str, int], types: list[int]) -> tuple[frozenset[int], frozenset[int]]:
    """The tokens that absorb whitespace on their left and right; like llama.cpp, recognized by the model's name."""

    def known(*texts: str) -> set[int]:
        return {ids[text] for text in texts if text in ids}

    left: set[int] = set()
    right: set[int] = set()
    if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code"):
        left = known("<mask>")
    elif "phi-3" in name or "phi3" in name:
        right = {i for i, kind in enumerate(types) if kind in SPECIAL_TYPES}
        right = (right | known("</s>")) - known("<unk>", "<s>", "<|endoftext|>")
    elif "modern-bert" in name:
        left = known("[MASK]")
    return frozenset(left), frozenset(right)


def read_vocabulary(metadata: Mapping[str, object], source: str = "") -> Vocabulary:
    """Reads and checks the `tokenizer.ggml.` keys; defaults of absent flags and ids are llama.cpp's.

    Raises:
        ModelFileError: a key is missing or inconsistent; the message names it.
        UnsupportedModelError: a tokenizer model other than "gpt2", "llama" and "gemma4", or an unknown pre-tokenizer.
    """
    keys = _Keys(metadata, source)
    model = keys.text("model")
    if model not in ("gpt2", "llama", "gemma4"):
        raise UnsupportedModelError(
            f"{keys.source}: tokenizer.ggml.model = {model!r} is not supported; supported: 'gpt2' (byte-level BPE), "
            "'llama' (SentencePiece BPE), 'gemma4' (BPE of characters), 'bert' (WordPiece)"
        )
    byte_level, by_score = model == "gpt2", model == "llama"
    pre_name = keys.text("pre", "default") if byte_level else ""
    pre = pre_tokenizer(pre_name, keys.source) if byte_level else None
    tokens, ids = _read_tokens(keys)
    count = len(tokens)
    types = [int(TokenType.NORMAL)] * count
    if PREFIX + "token_type" in metadata:
        types = keys.numbers("token_type", count, "iu").tolist()
    if types and not (min(types) >= 0 and max(types) <= max(TokenType)):
        raise keys.error("token_type", f"holds values outside 0 to {max(TokenType)}")
    scores = [0.0] * (count if by_score else 0)
    if scores and PREFIX + "scores" in metadata:
        array = keys.numbers("scores", count, "f")
        if np.isnan(array).any():
            raise keys.error("scores", f"token {int(np.isnan(array).argmax())} has a score that is not a number")
        scores = array.tolist()
    for i, kind in enumerate(types):
        if kind == TokenType.BYTE and not byte_level and not BYTE.fullmatch(tokens[i]):
            raise keys.error("tokens", f"token {i}, {tokens[i]!r}, is a byte by its type; <0x00> to <0xFF> are")
    defaults = {"gpt2": (11, 11, None), "llama": (1, 2, 0), "gemma4": (None, None, None)}[model]
    bos, eos, unknown = (
        keys.token(key, count, default) for key, default in zip(("bos", "eos", "unknown"), defaults, strict=True)
    )
    end_ids = _correct_types(keys, ids, types, eos)
    name = metadata.get("general.name", "")
    left, right = _stripping(name.lower() if isinstance(name, str) else "", pre_name, ids, types)
    return Vocabulary(
        source=keys.source,
        model=model,
        tokens=tokens,
        types=types,
        ids=ids,
        pre=pre,
        merges=[] if by_score else _read_merges(keys, ids),
        scores=scores,
        bos_id=bos,
        eos_id=eos,
        unk_id=unknown,
        pad_id=keys.token("padding", count),
        end_ids=end_ids,
        add_bos=model == "gemma4" or keys.flag("add_bos_token", pre.add_bos if pre else True),
        add_eos=keys.flag("add_eos_token", False),
        add_space_prefix=by_score and keys.flag("add_space_prefix", True),
        strip_left=left,
        strip_right=right,
    )
