"""JSON in a text that arrives in pieces: given on as it comes, as far as it is JSON."""

from __future__ import annotations

import json
import re

from ferrum_jax.parsing.reader import Give, Reader, Steps, silently

_DEEPEST = 128  # nested lists and objects; readers of JSON have limits too
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_WORD = re.compile(r"[-+.\w]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


def string(r: Reader, give: Give) -> Steps[bool]:
    """Takes a string, whose quotation mark is next; whether it is complete. Line breaks inside, which models write, are
    escaped."""
    yield give(_taken(r))
    while True:
        plain = _PLAIN.match(r.text, r.at)
        assert plain is not None
        r.at = plain.end()
        yield give(plain[0])
        if r.at == len(r.text):
            if give is not silently:
                r.forget()
            if not (yield from r.more()):
                return False
            continue
        head = r.text[r.at]
        if head == '"':
            yield give(_taken(r))
            return True
        if head == "\\":
            start = yield from r.ahead(2)
            escape = _ESCAPE.match((yield from r.ahead(6)) if start == "\\u" else start)
            if not escape:
                return False
            r.at += escape.end()
            yield give(escape[0])
        else:
            yield give(json.dumps(_taken(r))[1:-1])


def value(r: Reader, give: Give) -> Steps[bool]:
    """Takes a value and gives its text; whether it is complete. What cannot go on is left in the reader."""
    closers: list[str] = []
    # "item": a value or the end of a list; "key": a name or the end of an object; "name"; "next": comma or end
    expected = "value"
    while True:
        space = yield from r.space()
        yield give(space if closers else "")
        head = r.text[r.at : r.at + 1]
        if closers and head == closers[-1] and expected in ("item", "key", "next"):
            closers.pop()
            yield give(_taken(r))
        elif expected == "next" and head == ",":
            expected = "value" if closers[-1] == "]" else "name"
            yield give(_taken(r))
            continue
        elif expected in ("key", "name") and head == '"':
            if not (yield from string(r, give)):
                return False
            yield give((yield from r.space()))
            if not (yield from r.takes(":")):
                return False
            yield give(":")
            expected = "value"
            continue
        elif expected not in ("value", "item"):
            return False
        elif head == '"':
            if not (yield from string(r, give)):
                return False
        elif head and head in "{[" and len(closers) < _DEEPEST:
            closers.append("}" if head == "{" else "]")
            expected = "key" if head == "{" else "item"
            yield give(_taken(r))
            continue
        else:
            start = r.at
            word = yield from r.run(_WORD)
            if not _SCALAR.fullmatch(word):
                r.at = start
                return False
            yield give(word)
        if not closers:
            return True
        expected = "next"


def whole_string(r: Reader) -> Steps[str | None]:
    """Takes a string and returns what it stands for; None if there is none."""
    start = r.at
    if (yield from r.ahead(1)) != '"' or not (yield from string(r, silently)):
        return None
    found = json.loads(r.text[start : r.at], strict=False)
    return None if _SURROGATE.search(found) else found


def _taken(r: Reader) -> str:
    """Takes one letter."""
    r.at += 1
    return r.text[r.at - 1]
