"""Grammars of answers with calls, for the grammar library (llguidance's variant of Lark's syntax).

The one idea: what a format writes around the arguments is a line in a table, from which its grammar follows. Marks that are
control tokens in a vocabulary become references to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ferrum_jax.parsing.dialect import Dialect
from ferrum_jax.parsing.tools import kinds_of

Literal = Callable[[str], str]  # a text as the grammar has it


class _Written(NamedTuple):
    """How calls are written: before all of them, before and after the arguments of one, between two, after all of them.
    NAME stands for the name of a function; without `between` there is one call. `elements`: before and after the name of a
    parameter, and after its value."""

    begin: str
    before: str
    after: str
    between: str | None
    end: str = ""
    elements: tuple[str, str, str] | None = None


_WRITTEN = {
    "hermes": _Written("", '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n"),
    "llama": _Written("", '{"name": "NAME", "parameters": ', "}", "; "),
    "mistral": _Written("[TOOL_CALLS] [", '{"name": "NAME", "arguments": ', "}", ", ", "]"),
    "mistral_named": _Written("", "[TOOL_CALLS]NAME[ARGS]", "", ""),
    "deepseek": _Written(
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "", "<｜tool▁calls▁end｜>"
    ),
    "deepseek_old": _Written(
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n", "\n```<｜tool▁call▁end｜>",
        "\n", "<｜tool▁calls▁end｜>",
    ),
    "kimi": _Written(
        "<|tool_calls_section_begin|>", "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>", "<|tool_call_end|>",
        None, "<|tool_calls_section_end|>",
    ),
    "lfm": _Written("<|tool_call_start|>[", '{"name": "NAME", "arguments": ', "}", ", ", "]<|tool_call_end|>"),
    "harmony": _Written("", "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "", None),
    "qwen_xml": _Written(
        "", "<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>", "\n", "", ("<parameter=", ">\n", "\n</parameter>\n")
    ),
    "glm": _Written(
        "", "<tool_call>NAME\n", "</tool_call>", "\n", "", ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
    ),
}  # fmt: skip


_FORCED_ONLY = ("harmony", "lfm")  # their models also write calls in other ways


def answer(
    dialect: Dialect,
    schemas: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, int],
    *,
    forced: bool,
    parallel: bool,
    thinks: bool,
    opened: bool,
) -> str | None:
    """The grammar of an answer whose calls match their schemas, after reasoning if there is any; None if the format does not
    have one.

    Args:
      schemas: of the parameters of the functions that may be called.
      controls: the ids of the control tokens among the marks, by their texts.
      forced: whether the answer consists of calls; otherwise it may have text before, between and after them.
      parallel: whether there may be several calls.
      thinks: whether reasoning may come first; `opened`: whether the answer begins inside of it.
    """
    how, literal = _WRITTEN.get(dialect.calls), _literals(controls)
    mark = next((mark for mark in dialect.marks if how and (how.begin + how.before).startswith(mark)), "")
    if how is None or (not forced and (not mark or dialect.calls in _FORCED_ONLY)):
        return None
    rules: list[str] = []
    reasoning = _reasoning(dialect, literal, rules, opened) if thinks else ""
    calls = [_call(how, name, schema, literal, rules, i) for i, (name, schema) in enumerate(schemas.items())]
    rules.append("call: " + " | ".join(f"{literal(before)} {rest}" for before, rest in calls))
    first = "call"
    if not forced:  # what follows the first mark of the calls that come together
        rules.append(_until("said", mark, literal))
        begun = (f"{literal((how.begin + before)[len(mark) :])} {rest}" for before, rest in calls)
        rules += ["first: said (" + " | ".join(begun) + ")", "tail: /(.|\\n)*/"]
        first = "first"
    several = f" ({literal(how.between)} call)*" if parallel and how.between is not None else ""
    together = f"{first}{several} {literal(how.end)}"
    if forced:
        return "\n".join([f"start: {reasoning}{literal(how.begin)} {together}", *rules])
    return "\n".join([f"start: {reasoning}({together}){'*' if parallel else '?'} tail", *rules])


def after_reasoning(dialect: Dialect, rule: str, controls: Mapping[str, int], *, thinks: bool, opened: bool) -> str | None:
    """The grammar of an answer whose content is as a rule says, after reasoning; None if there is none. The arguments are those
    of `answer`."""
    literal, rules = _literals(controls), [f"content: {rule}"]
    if not thinks or not (reasoning := _reasoning(dialect, literal, rules, opened)):
        return None
    final = literal("<|channel|>final<|message|>") if dialect.is_harmony else ""
    return "\n".join([f"start: {reasoning}{final} content", *rules])


def _reasoning(dialect: Dialect, literal: Literal, rules: list[str], opened: bool) -> str:
    """The beginning of an answer, "" without reasoning. `rules`: gets those that it refers to."""
    if dialect.is_harmony:
        rules.append(_until("reasoning", "<|end|>", literal))
        return f"({literal('<|channel|>analysis<|message|>')} reasoning {literal('<|start|>assistant')})? "
    if not dialect.thinking:
        return ""
    rules += [_until("reasoning", dialect.thinking.close, literal), "space: /[ \\n]{0,4}/"]
    return "reasoning space " if opened else f"({literal(dialect.thinking.open)} reasoning space)? "


def _call(
    how: _Written, name: str, schema: Mapping[str, Any], literal: Literal, rules: list[str], number: int
) -> tuple[str, str]:
    """The text before the arguments of a call, and the grammar from there on. `rules`: gets the rules that it refers to."""
    before = how.before.replace("NAME", name)
    if how.elements is None:
        rules.append(f"arguments_{number}: %json {json.dumps({'type': 'object'} | dict(schema), ensure_ascii=False)}")
        return before, f"arguments_{number} {literal(how.after)}"
    opening, closing, end = how.elements
    parts, required = [], schema.get("required") or ()
    for i, (key, kind) in enumerate((schema.get("properties") or {}).items()):
        rule = f"value_{number}_{i}"
        rules.append(_value(rule, kind, schema, end, literal))
        part = f"{literal(opening + key + closing)} {rule}"
        parts.append(part if key in required else f"({part})?")
    return before, " ".join([*parts, literal(how.after)])


def _value(rule: str, kind: Any, root: Mapping[str, Any], end: str, literal: Literal) -> str:
    """The rule of a value and of what ends it. Texts are written as they are."""
    kinds = kinds_of(kind, root)
    if not kinds or "string" in kinds:
        choices = kind.get("enum") if isinstance(kind, dict) else None
        if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
            return f"{rule}: ({' | '.join(map(literal, choices))}) {literal(end)}"
        return _until(rule, end, literal)
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"{rule}: %json {json.dumps(dict(kind) | shared, ensure_ascii=False)} {literal(end)}"


def _until(rule: str, end: str, literal: Literal) -> str:
    """A rule of any text up to an end."""
    written = literal(end)
    return f"{rule}: /(.|\\n)*/ {written}" if written.startswith("<[") else f"{rule}[lazy]: /(.|\\n)*/ {written}"


def _literals(controls: Mapping[str, int]) -> Literal:
    """Writes a text for a grammar, with references to control tokens."""
    split = re.compile("(" + "|".join(map(re.escape, controls)) + ")") if controls else None

    def literal(text: str) -> str:
        parts = split.split(text) if split else [text]
        return " ".join(f"<[{controls[part]}]>" if part in controls else _quoted(part) for part in parts if part)

    return literal


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
