"""The chat of `ferrum-jax run` in a terminal.

The conversation is a list of messages that is rendered anew for every turn; nothing is ever dropped from it silently.
While an answer is made, Ctrl-C sets a flag that is read between two pieces, so the model is never left mid-step; what
was said so far stays in the conversation.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.answer import answer, encode, print_stats
from ferrum_jax.errors import FerrumError

FENCE = '"""'
HELP = f"""\
/clear     forget the conversation
/bye       leave (Ctrl-D too)
/help      this text
A line that ends in a backslash goes on in the next one, Alt-Enter starts a new line, and {FENCE} opens a block of
lines that {FENCE} closes. A message that begins with / needs a space before it.
Ctrl-C stops an answer; what was said so far stays in the conversation."""


def key_bindings() -> Any:
    """Enter sends, except after a backslash and inside an open block; Alt-Enter is always a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and not buffer.document.current_line_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif open_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _alt_enter(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


def open_block(text: str) -> bool:
    """True while a block that the text begins with is not closed."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) >= 2 * len(FENCE) and text.endswith(FENCE))


def message_of(line: str) -> str:
    """What was meant by the typed text: the inside of a block, or the text without the white space around it."""
    text = line.strip()
    if text.startswith(FENCE):
        return text.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return text


@contextlib.contextmanager
def ctrl_c_as_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C makes the yielded function true; a second one raises KeyboardInterrupt, for a step that hangs."""
    pressed = threading.Event()

    def note(_signal: int, _frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """A conversation with `model`. `template` holds the chat template's arguments, or is None: then every message is
    completed by itself, as it is."""

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        system: str | None = None,
        template: dict[str, Any] | None = None,
        stats: bool = False,
    ):
        self.model, self.params, self.template, self.stats = model, params, template, stats
        self.opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self.opening)

    def run(self, name: str) -> None:
        """Read and answer until /bye or Ctrl-D."""
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession(multiline=True, key_bindings=key_bindings())
        click.echo(f"{name}: /help lists the commands, Ctrl-D leaves")
        if self.template is None:
            click.echo("Without a chat template every text is completed by itself; there is no conversation.")
        while True:
            try:
                line = session.prompt(">>> ", prompt_continuation="... ")
                if not self.handle(line):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                click.echo("Ctrl-D or /bye leaves")

    def handle(self, line: str) -> bool:
        """Obey a command or answer a message; False when the chat is over."""
        if line.startswith("/"):
            return self.command(line.strip())
        text = message_of(line)
        if text:
            self.turn(text)
        return True

    def command(self, command: str) -> bool:
        if command == "/bye":
            return False
        if command == "/clear":
            self.messages = list(self.opening)
            click.echo("The conversation is forgotten.")
        elif command == "/help":
            click.echo(HELP)
        else:
            click.echo(f"unknown command {command.split()[0]}; /help lists the commands")
        return True

    def turn(self, text: str) -> None:
        """Answer `text`; the message and its answer join the conversation together or not at all."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = encode(self.model, asked, self.template)
        except (ValueError, FerrumError) as error:
            click.echo(f"not sent: {error}")
            click.echo("The conversation is as it was, nothing was dropped: try another message, or /clear.")
            return
        with ctrl_c_as_flag() as interrupted:
            result = answer(self.model, ids, self.params, self.show, interrupted)
        click.echo()
        if result.finish_reason == "abort" and not result.text:
            click.echo("[stopped before the answer began; the message is not part of the conversation]")
            return
        if self.template is not None:
            self.messages = [*asked, {"role": "assistant", "content": result.text}]
        if result.finish_reason == "abort":
            click.echo("[stopped]")
        elif result.finish_reason == "length":
            limit = self.model.max_seq_len
            full = len(ids) + result.usage["completion_tokens"] >= limit
            click.echo(f"[cut: the context of {limit:,} tokens is full]" if full else "[cut by --max-tokens]")
        if self.stats:
            print_stats(result)

    @staticmethod
    def show(text: str, _tokens: list[int]) -> None:
        sys.stdout.write(common.harmless(text))
        sys.stdout.flush()
