"""Grammars as llguidance compiles and follows them, for one tokenizer.

The one idea: a compiled grammar is kept, and each text follows a copy of it. What the library cannot do, or only with effort
beyond its limits, is a ValueError before anything runs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ferrum_jax.structured import Structured, schemas
from ferrum_jax.tokenizer import Tokenizer
from pallas_kernels import extras

_THREADS = 16
_KEPT, _KEPT_LENGTH = 64, 1 << 20  # compiled grammars, and the characters of their sources
_JSON = re.compile(r"%json\s*(?=\{)")
# Options of a rule that need more than a mask, such as `name[temperature=0.5]: ...`
_RULE_OPTION = re.compile(r"^\s*[\w-]+\[[^\]\n]*\b(temperature|stop)\s*=", re.MULTILINE)


class Grammars:
    """Compiles grammars for a tokenizer and keeps the newest ones.

    Raises ImportError if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer):
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(f"structured output needs llguidance; {extras.install('structured')}") from error
        self._library: Any = llguidance
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._kept: OrderedDict[Structured, Any] = OrderedDict()

    @functools.cached_property
    def _vocabulary(self) -> Any:
        if not self.tokenizer.eos_ids:
            raise ValueError("Structured: this model does not have an end token, so a text would not end")
        slices = self._library.LLTokenizer.json_slices()
        return self._library.LLTokenizer(_Tokens(self.tokenizer), eos_token=sorted(self.tokenizer.eos_ids), slices=slices)

    @functools.cached_property
    def _executor(self) -> Any:
        return self._library.LLExecutor(min(os.cpu_count() or 1, _THREADS))

    @functools.cached_property
    def _limits(self) -> Any:
        return self._library.LLParserLimits(verbose_errors=False)

    def follower(self, structured: Structured, begin: int) -> Follower:
        """A follower of a text whose token `begin` is the first one of the grammar.

        Raises ValueError for what the library cannot do.
        """
        with self._lock:
            grammar = self._kept.get(structured)
        if grammar is None:
            grammar = self._compile(structured)
        with self._lock:
            self._kept[structured] = grammar
            self._kept.move_to_end(structured)
            while len(self._kept) > _KEPT or (len(self._kept) > 1 and sum(kept.length for kept in self._kept) > _KEPT_LENGTH):
                self._kept.popitem(last=False)
            return Follower(grammar, begin)

    def masks(self, followers: Sequence[Follower], vocab_size: int) -> np.ndarray:
        """The tokens that may come next, as bits, the lowest first: int32 [followers, ceil(vocab_size / 32)], computed in the
        library's threads. A follower whose grammar has become too complex has an error afterwards."""
        words, own = -(-vocab_size // 32), -(-self._vocabulary.vocab_size // 32)
        found = np.zeros((len(followers), own), np.int32)
        pairs = [(follower.matcher, i) for i, follower in enumerate(followers)]
        self._executor.unsafe_compute_mask_ptr(pairs, found.ctypes.data, own * found.itemsize, len(pairs))
        for follower in followers:
            follower.check()
        return found if own == words else np.pad(found[:, :words], ((0, 0), (0, max(0, words - own))))

    def _compile(self, structured: Structured) -> Any:
        kind = structured.kind
        try:
            source = self._source(structured)
        except ValueError as error:
            raise ValueError(f"Structured.{kind}: {error}") from None
        matcher = self._library.LLMatcher(self._vocabulary, source, log_level=0, limits=self._limits)
        if wrong := _reason(matcher):
            raise ValueError(f"Structured.{kind}: {self._blame(structured)}{wrong}")
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise ValueError(f"Structured.{kind}: is too complex, or admits nothing ({first.stop_reason()})")
        return matcher

    def _blame(self, structured: Structured) -> str:
        """The place of the first regular expression in a schema that the library does not take, or ""."""
        make = self._library.LLMatcher
        patterns = schemas.prepared(str(structured.json_schema)).patterns if structured.json_schema is not None else {}
        for place, pattern in patterns.items():
            alone = make.grammar_from_json_schema(json.dumps({"type": "string"} | pattern))
            if make(self._vocabulary, alone, log_level=0, limits=self._limits).is_error():
                return f"{place}: "
        return ""

    def _source(self, structured: Structured) -> str:
        make = self._library.LLMatcher
        if structured.json_schema is not None:
            return make.grammar_from_json_schema(schemas.prepared(str(structured.json_schema)).text)
        if structured.regex is not None:
            return make.grammar_from_regex(structured.regex)
        if structured.choice is not None:
            return make.grammar_from_lark(f"start: {structured.rule}")
        return make.grammar_from_lark(_with_prepared_schemas(structured.lark or ""))


def _reason(matcher: Any) -> str:
    """What the library does not take, in a line, or ""."""
    lines = (matcher.get_error() if matcher.is_error() else "\n".join(matcher.get_grammar_warnings())).strip().splitlines()
    if not lines:
        return ""
    last = lines[-1].removeprefix("error: ") if len(lines) > 1 and lines[-1].startswith("error: ") else ""
    said = f"{lines[0]} {last}".strip().partition(" Enable ")[0].replace("patternProperty", "patternProperties")
    return f"{said:.300}"


def _with_prepared_schemas(lark: str) -> str:
    """A grammar whose JSON schemas are prepared."""
    if option := _RULE_OPTION.search(lark):
        raise ValueError(f"the option {option[1]!r} of a rule is not supported")
    parts, end = [], 0
    for found in _JSON.finditer(lark):
        if found.end() < end:
            continue  # inside a schema
        try:
            schema, length = json.JSONDecoder().raw_decode(lark[found.end() :])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"%json is not JSON: {error}") from None
        parts += [lark[end : found.end()], schemas.prepared(json.dumps(schema, ensure_ascii=False)).text]
        end = found.end() + length
    return "".join([*parts, lark[end:]])


class _Tokens:
    """A tokenizer as the library reads it. Control tokens are not text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token in range(tokenizer.vocab_size) if tokenizer.is_control(token)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


class Follower:
    """Where a text is in its grammar. `error`: why it cannot go on, or ""."""

    def __init__(self, grammar: Any, begin: int):
        self._grammar, self.matcher = grammar, grammar.deep_copy()
        self._begin, self._end = begin, begin  # of the tokens that were followed
        self.error = ""

    @property
    def end(self) -> int:
        """The number of tokens that were followed."""
        return self._end

    def follow(self, text: Sequence[int], made: Sequence[int] = ()) -> None:
        """Goes on to the end of a text and of the tokens that were made after it. What was followed before may have been
        longer, if its results were lost."""
        end = len(text) + len(made)
        if end < self._end:
            self.matcher, self._end = self._grammar.deep_copy(), self._begin
        for token in (*text[self._end :], *made[max(0, self._end - len(text)) :]):
            self.matcher.consume_token(token)
        self._end = end
        self.check()

    def forced(self, most: int, ends: Collection[int]) -> list[int]:
        """Up to `most` tokens that come next in any case, before one of `ends`. They are found one after the other, because
        the library may cut all of them into other tokens than what is left after the first one."""
        found, ahead = list[int](), self.matcher
        while len(found) < most and (tokens := ahead.compute_ff_tokens()) and tokens[0] not in ends:
            ahead = ahead if found else ahead.deep_copy()
            ahead.consume_token(tokens[0])
            found.append(tokens[0])
        return found

    def go_on(self, tokens: Sequence[int]) -> None:
        """Goes on over tokens after what was followed."""
        for token in tokens:
            self.matcher.consume_token(token)
        self._end += len(tokens)

    def check(self) -> None:
        """Sets the error. In the library's own message are parts of the grammar."""
        if not self.error and self.matcher.is_error():
            self.error = f"Structured: the grammar cannot go on ({self.matcher.stop_reason()})"
