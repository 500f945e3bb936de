"""The chat of `ferrum-jax run` in a terminal: reads a line, runs it as a command or answers it, and reports how that ended.

`conversation` keeps the messages, `terminal` edits lines, `writer` prints text.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

from ferrum_jax.cli import commands
from ferrum_jax.cli.answer import print_stats
from ferrum_jax.cli.conversation import Conversation, Message, open_engine
from ferrum_jax.cli.terminal import line_editor, message_of, quiet
from ferrum_jax.cli.writer import Writer, say, waiting
from ferrum_jax.errors import FerrumError
from ferrum_jax.hub.cache import cache_root


class Chat:
    """A chat with `model`. `template`: the chat template's arguments; None: every message is completed on its own, as it is.
    `history`: whether typed lines are kept for later chats."""

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        system: str | None = None,
        template: dict[str, Any] | None = None,
        stats: bool = False,
        history: bool = True,
    ):
        self.engine = open_engine(model)
        self.conversation = Conversation(model, self.engine, params, system=system, template=template)
        self.first = SimpleNamespace(params=params, system=system, template=template)  # what /set restores
        self.name, self.stats, self.history = "", stats, history

    def run(self, name: str) -> None:
        """Runs the whole chat; `name` is the model's name."""
        self.name = name
        completions = {word: command.completions(self) for word, command in commands.COMMANDS.items()}
        editor = line_editor(cache_root() / "history" if self.history else None, completions)
        say(f"{name}: /help lists the commands, Ctrl-D leaves")
        if self.conversation.template is None:
            say("This model does not have a chat template: each text is completed on its own, not as a conversation.")
        self.engine.__enter__()
        try:
            with quiet(editor.output):
                self.talk(editor)
        finally:
            with waiting(lambda: "leaving as soon as the current compilation is finished"):
                self.engine.__exit__()

    def talk(self, editor: Any) -> None:
        """Reads and answers lines until /bye or Ctrl-D."""
        with contextlib.suppress(EOFError):
            going = True
            while going:
                try:
                    line = editor.prompt(">>> ", prompt_continuation="... ")
                    editor.output.enable_bracketed_paste()  # text pasted during the answer is one message, too
                    editor.output.flush()
                    going = self.handle(line)
                except KeyboardInterrupt:
                    say("Ctrl-D or /bye leaves")

    def handle(self, line: str) -> bool:
        """Runs a command or answers a message. Returns False when the chat is over."""
        if line.startswith("/"):
            return commands.obey(self, line)
        if text := message_of(line):
            self.answer([*self.conversation.messages, {"role": "user", "content": text}])
        return True

    def answer(self, messages: list[Message]) -> None:
        """Answers the last of these messages and reports how that ended."""
        writer = Writer()
        try:
            with waiting(self.waited_for) as over:

                def show(text: str) -> None:
                    if text:
                        over()
                    writer.write(text)

                result = self.conversation.answer(messages, show)
        except (ValueError, FerrumError) as error:
            say(f"not sent: {error}")
            say("The conversation has not changed. Try another message, or /clear.")
            return
        if result.text or result.finish_reason == "stop":
            writer.close()
        if result.finish_reason == "error":
            say(f"[failed: {result.error}; the message is not part of the conversation]")
        elif result.finish_reason == "abort":
            began = "" if result.text else " before the answer began; the message is not part of the conversation"
            say(f"[stopped{began}]")
        elif result.finish_reason == "length":
            full = result.usage["prompt_tokens"] + result.usage["completion_tokens"] >= self.engine.context
            say(f"[cut: the context of {self.engine.context:,} tokens is full]" if full else "[cut by --max-tokens]")
        if self.stats:
            print_stats(result)

    def waited_for(self) -> str:
        """Why the answer has not begun yet."""
        ready, programs = self.engine.warmed_up
        return "reading" if ready == programs else f"compiling, {ready} of {programs} programs are ready"
