"""Chat templates: messages to the prompt that the model was trained on.

The template is a program inside a model file, so it runs in jinja2's sandbox and sees plain data only (dicts, lists,
strings, numbers). The environment is that of transformers' `apply_chat_template`, so the rendering is the same text.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from ferrum_jax.errors import ModelFileError, UnsupportedModelError

Message = Mapping[str, Any]


def render(
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **template_kwargs: Any,
) -> str:
    """The prompt text of a conversation.

    Args:
        template: `tokenizer.chat_template` of the model file; None where it has none.
        messages: dicts with "role" and what the template reads, mostly "content"; also "tool_calls" and others.
        tools: JSON schemas of the functions that the model may call; None for none.
        add_generation_prompt: end with the opening of the assistant's answer.
        bos_token, eos_token: texts of the file's tokens; templates write them.
        template_kwargs: further variables of the template, such as `enable_thinking=False`.

    Raises:
        UnsupportedModelError: there is no template.
        ModelFileError: the template is not valid jinja2, or it fails while it runs (a forbidden access, an undefined
            operation).
        ValueError: the template refuses the messages (its `raise_exception`), or they are no list of dicts with a role.
        TypeError: a tool is not a dict.
    """
    import jinja2

    if template is None:
        raise UnsupportedModelError("the model file has no tokenizer.chat_template, so it cannot chat; complete raw text")
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: a list of dicts is needed, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: entry {i} must be a dict with a string under 'role'")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            name = getattr(tool, "__name__", type(tool).__name__)
            raise TypeError(f"tools: entry {i}, {name}, must be a JSON schema as a dict; functions are not converted")
    variables = {"documents": None, "bos_token": bos_token, "eos_token": eos_token, **template_kwargs}
    variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
    conversation = [_with_reasoning(_plain(message)) for message in messages]
    try:
        return _compiled(template).render(_plain(variables), messages=conversation)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except jinja2.TemplateSyntaxError as error:
        raise ModelFileError(f"tokenizer.chat_template: line {error.lineno}: {error.message}") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ModelFileError(f"tokenizer.chat_template: fails on these messages: {error}") from error


def check_template(template: str, source: str) -> None:
    """Compiles a file's template. Raises ModelFileError naming the file where it is not valid jinja2."""
    import jinja2

    try:
        _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        problem = f"key tokenizer.chat_template: line {error.lineno}: {error.message}"
        raise ModelFileError(f"{source}: {problem}") from error


class _RefusedError(Exception):
    """The template's own `raise_exception`."""


def _plain(value: Any) -> Any:
    """The same data in types that have no methods worth misusing; other objects become the name of their type."""
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
    """The message with its reasoning under both names that templates read, whatever name the caller used."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise _RefusedError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class: it has methods
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
