"""Chat templates: render a conversation as the prompt format that the model was trained on.

A template is a program inside a model file, so it runs in jinja2's sandbox with limits (templates.py) and gets only plain
data (dicts, lists, strings, numbers). The environment is that of transformers' `apply_chat_template`, so the result is the
same text.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ferrum_jax.errors import ChatTemplateError, ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from ferrum_jax.templates import Compiled, Limits

Message = Mapping[str, Any]
KEY = "tokenizer.chat_template"  # of the default template; for other templates, a dot and the name follow
_TEXT_PARTS = ("text", "input_text", "output_text")
# Output of a template that cannot handle null or a list as content.
_MISTAKEN = ("None", "[]", "()", "'type': '", '"type": "', '"type":"')
_RESULTS = ("tool", "ipython", "function")


def choose(templates: Mapping[str, str], name: str | None = None, *, tools: bool = False) -> str | None:
    """Chooses a template: the one called `name`; without a name "tool_use" if there are tools and such a template, otherwise
    the default. Returns None if there are no templates. Raises ValueError with the known names if there is no such template."""
    chosen = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if chosen in templates or not (templates or name):
        return templates.get(chosen)
    known = ", ".join(sorted(templates)) or "none"
    raise ValueError(f"chat_template: the model does not have a chat template {chosen!r}; it has {known}")


def variables(template: str) -> frozenset[str]:
    """The variables that a template reads. Raises ModelFileError if it cannot be compiled."""
    return _compiled(template).reads


def render(
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    limits: "Limits | None" = None,
    **template_kwargs: Any,
) -> str:
    """Renders a conversation as the text of a prompt.

    Args:
        template: `tokenizer.chat_template` of the model file; None if there is none.
        messages: dicts with "role" and the other keys that the template reads, such as "content" and "tool_calls". Content can
            be a text, a list of text parts ({"type": "text", "text": ...}), which are joined unless the template handles lists,
            or None, which becomes "" unless the template handles None.
        tools: JSON schemas of functions that the model may call, or None.
        add_generation_prompt: end with the words that begin an answer.
        bos_token, eos_token: the texts of the file's tokens, for the template.
        limits: the time and memory for rendering; by default one second and 64 MiB.
        template_kwargs: further variables of the template, such as `enable_thinking=False`.

    Raises:
        UnsupportedModelError: if there is no template.
        ModelFileError: if the template cannot be compiled.
        ChatTemplateError: if it fails on the messages, rejects them (its `raise_exception`) or exceeds `limits`.
        ValueError: if the messages are not a list of dicts with a role, or the content of one is not text.
        TypeError: if a tool is not a dict.
    """
    if template is None:
        raise UnsupportedModelError(
            "the model file does not have a tokenizer.chat_template, so it cannot chat; complete plain text instead"
        )
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: must be a list of dicts, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: entry {i} must be a dict with a string under 'role'")
        if not isinstance(content := message.get("content"), str | list | tuple | None) and not _is_data(message):
            kind = type(content).__name__
            raise ValueError(f"messages: entry {i}: its content must be a text, a list of text parts or None, not {kind}")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            name = getattr(tool, "__name__", type(tool).__name__)
            raise TypeError(f"tools: entry {i}, {name}, must be a JSON schema as a dict; functions are not converted")
    given = {"documents": None, "bos_token": bos_token, "eos_token": eos_token, **template_kwargs}
    given = _plain(given | {"tools": tools, "add_generation_prompt": add_generation_prompt})
    conversation = [_with_reasoning(_plain(message)) for message in messages]
    texts = [_with_text(i, message) for i, message in enumerate(conversation)]
    compiled = _compiled(template)
    if texts == conversation:
        return _rendered(compiled, {**given, "messages": conversation}, limits)
    try:
        rich = _rendered(compiled, {**given, "messages": conversation}, limits)
    except ChatTemplateError:
        return _rendered(compiled, {**given, "messages": texts}, limits)
    try:
        plain = _rendered(compiled, {**given, "messages": texts}, limits)
    except ChatTemplateError:
        return rich
    parts = [part for message in conversation for part in _parts_of(message)]
    taken = all(isinstance(part, dict) and part["text"].strip() in rich for part in parts)
    seen, right = rich.lower(), plain.lower()
    mistaken = [mark.lower() for mark in (*_MISTAKEN, *map(str, parts))]
    return rich if taken and all(seen.count(mark) <= right.count(mark) for mark in mistaken) else plain


def check_template(template: str, source: str, name: str = "default") -> None:
    """Compiles a file's template. Raises ModelFileError with the file and the key if it cannot be compiled."""
    try:
        _compiled(template)
    except ModelFileError as error:
        key = KEY if name == "default" else f"{KEY}.{name}"
        raise ModelFileError(f"{source}: key {key}{str(error).removeprefix(KEY)}") from None


def _rendered(compiled: "Compiled", given: dict[str, Any], limits: "Limits | None") -> str:
    from ferrum_jax.templates import Limits, OverBudgetError, RefusedError

    try:
        return compiled.render(given, limits or Limits())
    except RefusedError as error:
        raise ChatTemplateError(str(error)) from None
    except OverBudgetError as error:
        raise ChatTemplateError(f"{KEY}: rendering these messages {error}; the template is damaged or hostile") from None
    except Exception as error:
        reason = str(error)[:500] or type(error).__name__
        raise ChatTemplateError(f"{KEY}: fails on these messages: {reason}") from None


def _parts_of(message: Mapping[str, Any]) -> list[Any]:
    """The parts of a message's content, or [] if the content is not a list of parts."""
    content = message.get("content")
    return list(content) if isinstance(content, list | tuple) and not _is_data(message) else []


def _is_data(message: Mapping[str, Any]) -> bool:
    """Whether the content is data from a tool, and so neither a text nor a list with texts or parts."""
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content if isinstance(content, str | None) else 0]
    return message["role"] in _RESULTS and bool(parts) and not any(isinstance(part, str | dict | None) for part in parts)


def _with_text(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message without nulls. Content that is null, missing or a list of parts becomes a text."""
    content = message.get("content")
    texts = []
    for i, part in enumerate(_parts_of(message)):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"messages: entry {number}: part {i} of its content has the type {kind!r}; the model takes text parts, "
                '{"type": "text", "text": ...}'
            )
        texts.append(text)
    found = {key: value for key, value in message.items() if value is not None}
    if texts or content in ([], ()):
        found["content"] = "".join(texts)
    return {"content": "", **found} if "content" not in found else found


def _plain(value: Any) -> Any:
    """The same data in plain types, whose methods a template cannot misuse. Other objects become the name of their type."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=16)
def _compiled(template: str) -> "Compiled":
    from jinja2 import TemplateSyntaxError

    from ferrum_jax.templates import Compiled

    try:
        return Compiled(template)
    except TemplateSyntaxError as error:
        raise ModelFileError(f"{KEY}: line {error.lineno}: {error.message}") from error
    except (Exception, RecursionError, MemoryError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError | MemoryError) else str(error)[:500]
        raise ModelFileError(f"{KEY}: cannot be compiled: {reason}") from None
