"""The chat of `ferrum-jax run` in a terminal: reads a line, obeys it as a command or has it answered, and says how that
ended. What is said is kept by `conversation`, lines are edited by `terminal` and written by `writer`.
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
    """A chat with `model`. `template` holds the chat template's arguments, or is None: then every message is completed by
    itself, as it is. `history`: whether typed lines are kept for later chats."""

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
        self.first = SimpleNamespace(params=params, system=system, template=template)  # what /set goes back to
        self.name, self.stats, self.history = "", stats, history

    def run(self, name: str) -> None:
        """Everything from the first line to the last; `name` is the model's."""
        self.name = name
        completions = {word: command.completions(self) for word, command in commands.COMMANDS.items()}
        editor = line_editor(cache_root() / "history" if self.history else None, completions)
        say(f"{name}: /help lists the commands, Ctrl-D leaves")
        if self.conversation.template is None:
            say("This model has no chat template: each text is completed by itself, not as a conversation.")
        self.engine.__enter__()
        try:
            with quiet(editor.output):
                self.talk(editor)
        finally:
            with waiting(lambda: "leaving as soon as the program that is being compiled is ready"):
                self.engine.__exit__()

    def talk(self, editor: Any) -> None:
        """Read and answer until /bye or Ctrl-D."""
        with contextlib.suppress(EOFError):
            going = True
            while going:
                try:
                    line = editor.prompt(">>> ", prompt_continuation="... ")
                    editor.output.enable_bracketed_paste()  # what is pasted during the answer is one message too
                    editor.output.flush()
                    going = self.handle(line)
                except KeyboardInterrupt:
                    say("Ctrl-D or /bye leaves")

    def handle(self, line: str) -> bool:
        """Obey a command or answer a message; False when the chat is over."""
        if line.startswith("/"):
            return commands.obey(self, line)
        if text := message_of(line):
            self.answer([*self.conversation.messages, {"role": "user", "content": text}])
        return True

    def answer(self, messages: list[Message]) -> None:
        """Answer the last of these messages, and say how that ended."""
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
            say("The conversation is as it was, nothing was dropped: try another message, or /clear.")
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
        """What keeps the answer from beginning."""
        ready, programs = self.engine.warmed_up
        return "reading" if ready == programs else f"compiling, {ready} of {programs} programs are ready"
