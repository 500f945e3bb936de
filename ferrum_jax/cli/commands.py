"""The commands of the chat, lines that begin with /. They are in the table at the end."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ferrum_jax.chat import variables
from ferrum_jax.cli.conversation import Conversation, Message
from ferrum_jax.cli.output import harmless, print_facts
from ferrum_jax.cli.writer import say
from ferrum_jax.units import readable_bytes

SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop",
)  # fmt: skip
_GIVEN = {
    "messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now",
}  # fmt: skip
_LONG = 200  # characters of a message that /show shows
_KEYS = """
A line that ends with a backslash continues on the next one, Alt-Enter starts a new line, and \"\"\" opens a block of lines \
that \"\"\" closes. To send a message that begins with /, put a space before it; lines that begin with a space are not \
kept in the history. Ctrl-C stops an answer; its text so far stays in the conversation."""
_WORDS: dict[str, Any] = {"on": True, "off": False, "none": None}


class Chat(Protocol):
    """A chat, as the commands see it. `first`: its initial parameters, system message and template arguments."""

    conversation: Conversation
    name: str
    first: Any

    def answer(self, messages: list[Message]) -> None: ...


class Command(NamedTuple):
    """A command calls `action(chat, argument)`, which returns False to end the chat. `completions` completes its argument."""

    argument: str
    help: str
    action: Callable[[Chat, str], bool | None]
    completions: Callable[[Chat], Any] = lambda _chat: None


def obey(chat: Chat, line: str) -> bool:
    """Runs a command. Returns False when the chat is over."""
    name, argument, *_ = [*line.split(maxsplit=1), ""]
    argument = argument.strip()
    command = COMMANDS.get(name)
    if command is None:
        say(f"unknown command {name}; /help lists the commands")
        return True
    if bool(argument) != bool(command.argument) and not command.argument.startswith("["):
        say(f"{name} {command.argument or 'does not take an argument'}")
        return True
    if chat.conversation.template is None and command.argument == "FILE":
        say("This model does not have a chat template, so there is no conversation.")
        return True
    return command.action(chat, argument) is not False


def _clear(chat: Chat, _argument: str) -> None:
    chat.conversation.clear()
    say("The conversation is cleared.")


def _regenerate(chat: Chat, _argument: str) -> None:
    if chat.conversation.asked:
        chat.answer(chat.conversation.asked)
    else:
        say("There is no message to regenerate yet.")


def _save(chat: Chat, argument: str) -> None:
    talk, path = chat.conversation, Path(argument).expanduser()
    opening = [{"role": "system", "content": talk.system}] if talk.system is not None else []
    content = {"model": chat.name, "messages": [*opening, *talk.messages]}
    try:
        if path.exists():
            _messages(path)  # replaces only saved conversations
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except (OSError, ValueError) as error:
        say(f"not saved: {error}")
    else:
        say(f"saved {_count(talk)} to {path}")


def _load(chat: Chat, argument: str) -> None:
    talk, path = chat.conversation, Path(argument).expanduser()
    try:
        messages = _messages(path)
    except (OSError, ValueError) as error:
        say(f"not loaded: {error}")
        return
    begins = bool(messages) and messages[0]["role"] == "system"
    talk.system = messages[0]["content"] if begins else None
    talk.clear(messages[begins:])
    say(f"loaded {_count(talk)} from {path}")


def _count(talk: Conversation) -> str:
    return f"{len(talk.messages)} message{'s' * (len(talk.messages) != 1)}"


def _messages(path: Path) -> list[dict[str, Any]]:
    """The messages in a file that /save wrote or that holds a list of them. Raises ValueError for any other file."""
    wrong = f"{path} is not a saved conversation"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{wrong}: it is not JSON") from None
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list):
        raise ValueError(f'{wrong}: it does not have a list under "messages"')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{wrong}: message {number} does not have a text under "role" and "content"')
    return messages


def _set(chat: Chat, argument: str) -> None:
    name, _, written = argument.partition(" ")
    talk, first = chat.conversation, chat.first
    if name == "think" and "enable_thinking" in _switches(chat):
        name = "enable_thinking"
    value = _value(written.strip())
    if name in SAMPLING:
        if name == "stop" and not isinstance(value, list | str):
            value = written.strip()
        try:
            talk.params = dataclasses.replace(talk.params, **{name: value if written else getattr(first.params, name)})
        except ValueError as error:
            say(f"not set: {error}")
            return
        value = getattr(talk.params, name)
    elif talk.template is not None and name == "system":
        value = talk.system = (value if isinstance(value, str) else written.strip()) or None if written else first.system
    elif talk.template is not None and name in _switches(chat):
        others = {key: kept for key, kept in talk.template.items() if key != name}
        initial = {name: first.template[name]} if name in (first.template or {}) else {}
        talk.template = others | ({name: value} if written else initial)
        value = talk.template.get(name, "chosen by the template")
    else:
        say(f"you can set: {', '.join(_names(chat))}")
        return
    say(f"{name}: {_shown(value)}")


def _value(written: str) -> Any:
    """The value of a word such as "on", of a number or of JSON; otherwise the text itself."""
    if written in _WORDS:
        return _WORDS[written]
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def _shown(value: Any) -> str:
    words = [word for word, meant in _WORDS.items() if meant is value]
    if words or value == ():
        return words[0] if words else "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(chat: Chat) -> list[str]:
    """The names that /set accepts."""
    return [*SAMPLING, *(() if chat.conversation.template is None else ("system", *_switches(chat)))]


def _switches(chat: Chat) -> list[str]:
    """The variables that the chat template reads in addition to those that every template gets."""
    return sorted(variables(chat.conversation.model.tokenizer.chat_template or "") - _GIVEN)


def _show(chat: Chat, _argument: str) -> None:
    print_facts((name, harmless(value)) for name, value in _facts(chat))


def _facts(chat: Chat) -> Iterator[tuple[str, str]]:
    """The rows of a table: the model, the settings, and each message of the conversation."""
    talk = chat.conversation
    model, config, memory = talk.model, talk.model.config, talk.model.memory()
    yield "model", f"{chat.name}: {config.architecture}, {config.num_layers} layers, {config.dtype}"
    weights, token = (readable_bytes(memory[key]) for key in ("parameters_total", "kv_bytes_per_token"))
    yield "memory", f"weights {weights}; KV cache {token} a token, {model.kv_dtype}"
    for name in SAMPLING:
        if (value := getattr(talk.params, name)) not in (None, ()):
            yield name, _shown(value)
    if talk.system is not None:
        yield "system", talk.system
    for name, value in (talk.template or {}).items():
        yield name, _shown(value)
    yield "conversation", f"{_count(talk)}, {talk.used:,} of {talk.engine.context:,} tokens"
    for message in talk.messages:
        text = " ".join(message["content"].split())
        yield message["role"], text if len(text) <= _LONG else f"{text[:_LONG]} ..."


def _help(_chat: Chat, _argument: str) -> None:
    print_facts((f"{name} {command.argument}", command.help) for name, command in COMMANDS.items())
    say(_KEYS)


def _settings(chat: Chat) -> Any:
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter(lambda: _names(chat))


def _files(_chat: Chat) -> Any:
    from prompt_toolkit.completion import PathCompleter

    return PathCompleter(expanduser=True)


COMMANDS = {
    "/regenerate": Command("", "answer the last message again", _regenerate),
    "/set": Command(
        "[NAME [VALUE]]", "set a sampling parameter, the system message or a switch of the chat template; without VALUE "
        "restore its initial value; without NAME list the names", _set, _settings,
    ),
    "/show": Command("", "show the model, the settings and the conversation", _show),
    "/save": Command("FILE", "write the conversation as JSON", _save, _files),
    "/load": Command("FILE", "continue a conversation that /save wrote", _load, _files),
    "/clear": Command("", "start a new conversation", _clear),
    "/help": Command("", "show this text", _help),
    "/bye": Command("", "leave (or Ctrl-D)", lambda _chat, _argument: False),
}  # fmt: skip
