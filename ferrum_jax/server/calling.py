"""What a request says about functions: which there are, which have to be called, and earlier calls in its messages."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ferrum_jax.server.errors import ApiError

_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_MOST = 512  # functions in a request


@dataclasses.dataclass(frozen=True)
class Calling:
    """The functions of a request.

    Attributes:
      tools: as chat templates take them.
      forced: whether the answer has to be a call.
      named: the functions that may be called; (): all.
      strict: the functions whose arguments have to match their schema.
      parallel: whether an answer may have several calls.
    """

    tools: tuple[dict[str, Any], ...] = ()
    forced: bool = False
    named: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def callable(self) -> list[dict[str, Any]]:
        """Those of the tools that may be called."""
        return [tool for tool in self.tools if not self.named or tool["function"]["name"] in self.named]


NO_TOOLS = Calling()


def calling(
    functions: Sequence[Mapping[str, Any]],
    choice: str | Sequence[str],
    *,
    forced: bool = False,
    parallel: bool | None = None,
) -> Calling:
    """Checks the functions of a request.

    Args:
      functions: with "name", and maybe "description", "parameters" and "strict".
      choice: "none", "auto", "required", or the names of those that may be called.
      forced: whether one has to be called.
      parallel: whether an answer may have several calls; None: it may.
    """
    tools: list[dict[str, Any]] = []
    strict: list[str] = []
    for i, function in enumerate(functions):
        name, description, schema = (function.get(key) for key in ("name", "description", "parameters"))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _wrong(f"tools.{i}", "a function has a name, of 1 to 128 letters, digits and _ - . : /")
        if not isinstance(schema, dict | None):
            raise _wrong(f"tools.{i}", f"the parameters of {name} must be a JSON schema, an object")
        if not isinstance(description, str | None):
            raise _wrong(f"tools.{i}", f"the description of {name} must be a text")
        told = {"name": name} if description is None else {"name": name, "description": description}
        tools.append({"type": "function", "function": told | {"parameters": schema or {"type": "object", "properties": {}}}})
        strict += [name] if function.get("strict") else []
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise _wrong("tools", f"there are two functions {next(name for name in names if names.count(name) > 1)}")
    if len(tools) > _MOST:
        raise _wrong("tools", f"at most {_MOST} functions are allowed")
    named = () if isinstance(choice, str) else tuple(dict.fromkeys(choice))
    for unknown in set(named) - set(names):
        raise _wrong("tool_choice", f"there is no function {unknown!r:.80} among the tools")
    if (forced := forced or choice == "required") and not tools:
        raise _wrong("tool_choice", "a function must be called, and there are no tools")
    return NO_TOOLS if choice == "none" else Calling(tuple(tools), forced, named, tuple(strict), parallel is not False)


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field)


def prepare(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their calls checked: ids and names for all of them, arguments as texts, and names for the results."""
    found, names = [], dict[str, str]()
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        message = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            field = f"messages.{i}.tool_calls"
            if not isinstance(calls, list):
                raise _wrong(field, "must be a list")
            message["tool_calls"] = [_checked(call, f"{field}.{j}") for j, call in enumerate(calls)]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"]}
        if message.get("role") == "tool" and not message.get("name"):
            name = names.get(str(message.get("tool_call_id")))
            message |= {} if name is None else {"name": name}
        found.append(message)
    return found


def _checked(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(field, 'a call is {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}')
    given = function.get("arguments")
    if not isinstance(given, str | dict | None):
        raise _wrong(field, "the arguments of a call are the text of a JSON object")
    written = json.dumps(given or {}, ensure_ascii=False) if not isinstance(given, str) else given
    return {"id": str(call.get("id") or ""), "type": "function", "function": {"name": function["name"], "arguments": written}}


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects, as far as they are."""
    return [
        message | {"tool_calls": [_with_object(call) for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in messages
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    try:
        given = json.loads(call["function"]["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": call["function"] | {"arguments": given}} if isinstance(given, dict) else call


# OpenAI's forms, of Chat Completions and of Responses, which differ in where the name is


def openai_calling(tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> Calling:
    """From the fields tools, tool_choice and parallel_tool_calls."""
    functions = [_function(tool, f"tools.{i}") for i, tool in enumerate(tools or ())]
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in (None, "none", "auto", "required"):
        return calling(functions, kind or "auto", parallel=parallel)
    if kind == "function":
        return calling(functions, [_name(choice)], forced=True, parallel=parallel)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        listed = allowed.get("tools") if isinstance(allowed, dict) else None
        if isinstance(listed, list) and listed and allowed.get("mode") in ("auto", "required"):
            names = [_name(tool) for tool in listed]
            return calling(functions, names, forced=allowed["mode"] == "required", parallel=parallel)
    raise _wrong("tool_choice", "must be none, auto, required, a function with its name, or allowed_tools")


def _function(tool: dict[str, Any], field: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise _wrong(field, f"the type {tool.get('type')!r:.40} is not supported here; only functions are")
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        raise _wrong(field, "a function is an object with a name")
    return function


def _name(choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong("tool_choice", "a function has a name")
    return function["name"]
