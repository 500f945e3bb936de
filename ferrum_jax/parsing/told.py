"""Calls of functions for models whose chat template does not have a place for them.

The one idea: what the functions are, and how a call is written, stands in a message; earlier calls and their results are texts.
The way to write them is that of the parser `hermes`, which reads the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

PARSER = "hermes"
_HOW = """You can call functions. Each line between the tags <tools> describes one, with a JSON schema of its parameters:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as a JSON object between the tags <tool_call>, such as
<tool_call>
{{"name": "function", "arguments": {{"parameter": "value"}}}}
</tool_call>
Several calls follow one another. The results come between the tags <tool_response>. Answer without a call if none is needed."""


def instructions(tools: Sequence[dict[str, Any]]) -> str:
    """What a model is told about its functions."""
    return _HOW.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))


def with_instructions(messages: list[dict[str, Any]], text: str, *, system: bool) -> list[dict[str, Any]]:
    """Messages of plain texts with instructions added: at the end of the system message; if there is none, in a new one
    (`system`) or at the beginning of the first message."""
    if not messages or (messages[0].get("role") not in ("system", "developer") and system):
        return [{"role": "system", "content": text}, *messages]
    first, before = messages[0], messages[0].get("role") not in ("system", "developer")
    parts = [text, first["content"]] if before else [first["content"], text]
    return [first | {"content": "\n\n".join(filter(None, parts))}, *messages[1:]]


def as_texts(messages: Sequence[dict[str, Any]], text_of: Callable[[Any, str], str]) -> list[dict[str, Any]]:
    """Messages whose calls and results are texts. Results that come together are one message of the user, with what the user
    says after them, because many templates alternate.

    Args:
      messages: with their calls checked.
      text_of: the text of a content, given the name of its field.
    """
    found: list[dict[str, Any]] = []
    answered = False  # the last message has results
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        text = "" if content is None else text_of(content, f"messages.{i}.content")
        result = role in ("tool", "function")
        if result:
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        written = "\n".join(filter(None, [text, *calls]))
        if answered and role == "user":
            found[-1]["content"] += "\n" + written
        else:
            rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id", "name")}
            found.append(rest | {"role": role, "content": written})
        answered = result or (answered and role == "user")
    return found


def _call(function: dict[str, Any]) -> str:
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {function["arguments"] or "{}"}}}\n</tool_call>'
