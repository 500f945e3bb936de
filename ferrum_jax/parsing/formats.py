"""How models write calls of functions. Each format is a generator that reads one or several calls after a mark.

A reader of a call returns False if what follows the mark is not a call; its text is then content. Once the name is known and
the arguments begin, the call is told, so that long arguments arrive while they are written. If they turn out not to be
JSON, the call ends incomplete, and what is left of the text is content.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from ferrum_jax.parsing import json_text
from ferrum_jax.parsing.events import Arguments, Call, CallEnd, Content
from ferrum_jax.parsing.reader import Reader, Steps, silently
from ferrum_jax.parsing.tools import Tools, argument

_NAME = re.compile(r"[\w.:/-]*")


@dataclasses.dataclass(frozen=True)
class Format:
    """A way of writing calls.

    Attributes:
      opens: the marks after which `read` is called.
      read: takes the calls after a mark; whether there is one.
      bare: takes calls without a mark at the beginning of the content.
      noise: marks that are left out of the content.
      inside: further marks within calls.
    """

    opens: tuple[str, ...]
    read: Callable[[Reader, str, Tools], Steps[bool]]
    bare: Callable[[Reader, Tools], Steps[bool]] | None = None
    noise: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


def content(r: Reader, how: Format, tools: Tools) -> Steps[None]:
    """The rest of an answer: content and calls. White space around calls is left out."""
    yield from r.space()
    r.at, called = 0, False
    if how.bare:
        called = yield from how.bare(r, tools)
        r.at = r.at if called else 0
    while True:
        r.forget()
        if called:
            yield from r.space()
            if r.finished:
                return
            r.at = 0
        mark = yield from r.until(how.opens + how.noise, Content, trim=" \t\r\n")
        if not mark:
            return
        if mark in how.noise:
            continue
        dropped = r.dropped
        r.forget()
        if (yield from how.read(r, mark, tools)):
            called = True
        else:
            r.at = 0
            yield Content(dropped + mark)


def arguments(r: Reader) -> Steps[bool]:
    """Gives the arguments of a call that has begun, a JSON object, and its end; whether they are complete."""
    yield from r.space()
    complete = yield from json_text.value(r, Arguments)
    yield CallEnd(complete)
    return complete


def json_call(r: Reader, tools: Tools, *, first: tuple[str, ...] = (), known: bool = False) -> Steps[bool]:
    """Takes a call as a JSON object: {"name": ..., "arguments" or "parameters": {...}}.

    Args:
      first: the keys with which it may begin; (): any.
      known: only a call of a function of `tools` is one.
    """
    name, written, begun, strange, count = None, "", False, False, 0
    if not (yield from r.takes("{")):
        return False
    while True:
        yield from r.space()
        if (yield from r.takes("}")):
            break
        if count and not (yield from r.takes(",")):
            return begun
        yield from r.space()
        key = yield from json_text.whole_string(r)
        if key is None or (first and not count and key not in first):
            return begun
        yield from r.space()
        if not (yield from r.takes(":")):
            return begun
        yield from r.space()
        count += 1
        start = r.at
        if key == "name" and name is None:
            name = yield from json_text.whole_string(r)
            if not name or (known and name not in tools.schemas):
                return False
        elif key in ("arguments", "parameters") and not begun and name and (yield from r.ahead(1)) == "{":
            begun = True
            yield Call(tools.new_id(), name)
            r.forget()
            if not (yield from arguments(r)):
                return True
        else:
            if not (yield from json_text.value(r, silently)):
                return begun
            if key in ("arguments", "parameters"):
                written = r.text[start : r.at]
            strange = strange or key not in ("arguments", "parameters", "id", "type")
    if begun or name is None or (strange and not written):
        return begun
    whole = _object(written)
    if whole is None:
        return False
    yield Call(tools.new_id(), name)
    yield Arguments(whole)
    yield CallEnd(True)
    return True


def _object(written: str) -> str | None:
    """The JSON object in a text, which may be the JSON string of one, or null; None if it is something else."""
    if written in ("", "null"):
        return "{}"
    if written.startswith('"'):
        written = json.loads(written, strict=False)
        try:
            return written if isinstance(json.loads(written), dict) else None
        except (ValueError, RecursionError):
            return None
    return written if written.startswith("{") else None


def _close(r: Reader, *marks: str) -> Steps[bool]:
    """Takes a mark that may follow after white space."""
    start = r.at
    yield from r.space()
    if (yield from r.takes(*marks)):
        return True
    r.at = start
    return False


# ---- JSON


def hermes(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, or several calls, in marks that are similar."""
    yield from r.space()
    found = yield from (_list if (yield from r.ahead(1)) == "[" else _series)(r, tools)
    if found:
        yield from _close(r, mark.replace("<", "</"))
    return found


def llama(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<|python_tag|>{"name": ..., "parameters": {...}}, several with semicolons between them."""
    return (yield from _series(r, tools))


def llama_bare(r: Reader, tools: Tools) -> Steps[bool]:
    """The same without a mark, if the name is known."""
    return (yield from _series(r, tools, known=True))


def _series(r: Reader, tools: Tools, *, known: bool = False) -> Steps[bool]:
    """Calls one after the other."""
    found = False
    while True:
        start = r.at
        yield from r.space()
        if found:
            yield from r.takes(";")
            yield from r.space()
        if not (yield from json_call(r, tools, first=("name", "type", "id") if known else (), known=known)):
            r.at = start
            return found
        found = True


def mistral(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...} for each call."""
    yield from r.space()
    if (yield from r.ahead(1)) == "[" and (yield from r.ahead(6)) != "[ARGS]":
        return (yield from _list(r, tools))
    name = yield from r.run(_NAME)
    if (yield from r.takes("[CALL_ID]")):
        yield from r.run(_NAME)
    yield from r.takes("[ARGS]")
    return (yield from _named(r, tools.new_id(), name))


def _list(r: Reader, tools: Tools) -> Steps[bool]:
    """A JSON list of calls."""
    yield from r.takes("[")
    found = False
    while True:
        yield from r.space()
        if not (yield from json_call(r, tools)):
            return found
        found = True
        yield from _close(r, ",", "]")


def _named(r: Reader, id: str, name: str) -> Steps[bool]:
    """A call whose arguments are next."""
    yield from r.space()
    if not name or (yield from r.ahead(1)) != "{":
        return False
    yield Call(id, name)
    r.forget()
    yield from arguments(r)
    return True


def deepseek(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>; in older models function<｜tool▁sep｜>name and {...} as code."""
    yield from r.space()
    name = yield from r.run(_NAME)
    if not (yield from r.takes("<｜tool▁sep｜>")):
        return False
    if name == "function" and (yield from r.ahead(1)) != "{":
        name = yield from r.run(_NAME)
        yield from _close(r, "```json")
    if not (yield from _named(r, tools.new_id(), name)):
        return False
    yield from _close(r, "```")
    yield from _close(r, "<｜tool▁call▁end｜>")
    return True


def kimi(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>, where what comes first is the id."""
    yield from r.space()
    id = yield from r.run(_NAME)
    if not (yield from _close(r, "<|tool_call_argument_begin|>")):
        return False
    if not (yield from _named(r, id, re.sub(r":\d+$", "", id.removeprefix("functions.")))):
        return False
    yield from _close(r, "<|tool_call_end|>")
    return True


# ---- Parameters as elements


def qwen_xml(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>"""
    if mark == "<tool_call>":
        yield from r.space()
        if not (yield from r.takes("<function=")):
            return False
    name = yield from r.run(_NAME)
    if not name or not (yield from r.takes(">")):
        return False
    closes = ("</function>", "</tool_call>")
    if (yield from _elements(r, tools, name, "<parameter=", ">", "", ("\n</parameter>", "</parameter>"), closes)):
        yield from _close(r, "</tool_call>")
    return True


def glm(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>"""
    yield from r.space()
    name = yield from r.run(_NAME)
    yield from r.space()
    if not name or not (yield from r.ahead(9)).startswith(("<arg_key>", "</tool_ca")):
        return False
    yield from _elements(
        r, tools, name, "<arg_key>", "</arg_key>", "<arg_value>", ("</arg_value>",), ("</tool_call>",)
    )  # fmt: skip
    return True


def _elements(
    r: Reader, tools: Tools, name: str, key_open: str, key_close: str, open: str, closes: tuple[str, ...], ends: tuple[str, ...]
) -> Steps[bool]:
    """A call whose parameters are elements; whether it is complete. Without `open`, a line break may begin a value."""
    yield Call(tools.new_id(), name)
    yield Arguments("{")
    separator = ""
    while True:
        r.forget()
        yield from r.space()
        found = yield from r.takes(key_open, *ends)
        if found in ends:
            yield Arguments("}")
            yield CallEnd(True)
            return True
        key, end = (yield from r.before(key_close)) if found else ("", "")
        if end and open:
            yield from r.space()
        if not end or (open and not (yield from r.takes(open))):
            r.at = 0
            break
        if not open:
            yield from r.takes("\n")
        kinds = tools.kinds(name, key)
        yield Arguments(f"{separator}{_json(key)}: ")
        separator = ", "
        if kinds == ("string",):
            yield Arguments('"')
            end = yield from r.until(closes, lambda text: Arguments(_json(text)[1:-1]))
            yield Arguments('"' if end else "")
        else:
            text, end = yield from r.before(*closes)
            yield Arguments(_json(argument(text, kinds)) if end else _json(text)[:-1])
        if not end:
            break
    yield CallEnd(False)
    return False


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---- Calls that are told when they are complete


def gemma(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<|tool_call>call:name{key:<|"|>text<|"|>,other:1}<tool_call|>"""
    if not (yield from r.takes("call:")):
        return False
    name = yield from r.run(_NAME)
    written, end = yield from r.before("<tool_call|>")
    if not end or not name:
        return False
    parts = written.split('<|"|>')
    for i, part in enumerate(parts):
        keyed = re.sub(r'(?<=[{,])(\s*)([^\s:{}\[\],"]+)(\s*:)', r'\1"\2"\3', part)
        parts[i] = _json(part) if i % 2 else re.sub(r"\bNone\b", "null", keyed)
    return (yield from _told(tools, lambda: [(name, json.loads("".join(parts)))]))


def lfm(r: Reader, mark: str, tools: Tools) -> Steps[bool]:
    """<|tool_call_start|>[name(key="text", other=1)]<|tool_call_end|>, or a JSON list of calls."""
    if (yield from r.ahead(2)) == "[{":
        found = yield from _list(r, tools)
        yield from _close(r, "<|tool_call_end|>")
        return found
    written, end = yield from r.before("<|tool_call_end|>")

    def calls() -> list[tuple[str, Any]]:
        found = ast.parse(written.strip(), mode="eval").body
        listed = found.elts if isinstance(found, ast.List) else [found]
        return [
            (ast.unparse(call.func), {str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
            for call in listed
            if isinstance(call, ast.Call) and not call.args
        ] + [("", None) for call in listed if not isinstance(call, ast.Call) or call.args]

    return bool(end) and (yield from _told(tools, calls))


def _told(tools: Tools, calls: Callable[[], list[tuple[str, Any]]]) -> Steps[bool]:
    """Complete calls; whether they are names with objects."""
    try:
        found = [(name, json.dumps(given, ensure_ascii=False, allow_nan=False)) for name, given in calls()]
        whole = bool(found) and all(name and written.encode()[:1] == b"{" for name, written in found)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        whole = False
    for name, written in found if whole else ():
        yield Call(tools.new_id(), name)
        yield Arguments(written)
        yield CallEnd(True)
    return whole
