"""Output that matches a JSON schema, a regular expression, one of some texts or a grammar.

The one idea: after each token the host knows which tokens can still lead to a match, and gives the device that set as bits;
choosing the next token starts from it. `Structured` is what a user asks for. `schemas` turns a JSON schema into one that the
grammar library (llguidance) does wholly, or refuses it by name; `grammar` compiles and follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_LENGTH = 1 << 18  # characters of a schema, an expression, a grammar, or all choices
MAX_CHOICES = 1 << 12


@dataclass(frozen=True)
class Structured:
    """What the whole output has to be; exactly one of the fields is given.

    Attributes:
      json_schema: JSON that is valid under this schema: a dict, a JSON text, or True for any JSON object. Stored as text.
        Objects have their properties in the order of the schema; there is no white space before and after the value.
      regex: a text that the regular expression matches from its beginning to its end, in the syntax of Rust's regex crate.
      choice: one of these texts.
      lark: a text of this grammar, in llguidance's variant of Lark's syntax. It may refer to control tokens (`<|name|>`, or any
        token as `<[id]>`), and has JSON schemas as `%json {...}`.

    Raises:
      ValueError: for a wrong type, for several fields or none, and for what is too long.
    """

    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Structured has exactly one of {', '.join(names)}; got {' and '.join(given) or 'none'}")
        if self.choice is not None:
            texts = self.choice
            right = isinstance(texts, Sequence) and not isinstance(texts, str) and 0 < len(texts) <= MAX_CHOICES
            if not right or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"Structured.choice must be a list of 1 to {MAX_CHOICES} non-empty texts, not {texts!r:.80}")
            object.__setattr__(self, "choice", tuple(texts))
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _text_of(self.json_schema))
        for text in self.texts:
            if not isinstance(text, str):
                raise ValueError(f"Structured.{self.kind} must be a text, not {text!r:.80}")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"Structured.{self.kind} has half of a surrogate pair")
        if self.length > MAX_LENGTH:
            raise ValueError(f"Structured.{self.kind} has {self.length:,} characters; at most {MAX_LENGTH:,} are possible")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def texts(self) -> tuple[str, ...]:
        """What is given: each choice, or one text."""
        return tuple(self.choice or [getattr(self, self.kind)])

    @property
    def rule(self) -> str:
        """The right side of a rule in Lark's syntax that says the same."""
        if self.choice is not None:
            return " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
        (text,) = self.texts
        if self.json_schema is not None:
            return "%json " + ("{}" if text.strip() == "true" else text)
        if self.regex is not None:
            return "/" + re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], text).replace("\n", r"\n") + "/"
        return f"%lark {{\n{text}\n}}"

    @property
    def length(self) -> int:
        """The characters that are given."""
        return sum(map(len, self.texts))


def _text_of(schema: object) -> str:
    """A JSON schema as text."""
    if schema is True:
        return '{"type":"object"}'
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"Structured.json_schema must be a dict, a JSON text or True, not {schema!r:.80}")
    try:
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Structured.json_schema is not JSON: {error}") from None
