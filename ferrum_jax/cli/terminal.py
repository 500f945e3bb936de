"""The terminal of a chat: edits a line, and keeps what the user types while an answer is generated.

Meanwhile the terminal does not echo, and the kept text begins the next line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

FENCE = '"""'


@contextlib.contextmanager
def quiet(output: Any) -> Iterator[None]:
    """While no line is edited, typed text is kept and not shown. At the end of the block, also after SIGTERM or SIGHUP, the
    terminal gets its old settings back. `output`: the line editor's."""
    try:
        import termios
    except ImportError:  # Windows, where the console echoes only while it is read
        termios = None  # type: ignore[assignment]
    if termios is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    after = [*before]
    after[0] &= ~termios.ICRNL  # Enter stays a carriage return
    after[3] = after[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C does not discard typed text

    def apply(*_: Any) -> None:
        termios.tcsetattr(terminal, termios.TCSADRAIN, after)

    def leave(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    handlers: dict[int, Any] = {signal.SIGTERM: leave, signal.SIGHUP: leave, signal.SIGCONT: apply}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        apply()
        yield
    finally:
        with contextlib.suppress(termios.error, OSError):  # the terminal has been closed
            output.disable_bracketed_paste()
            output.flush()
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in previous.items():
            signal.signal(number, handler)


def line_editor(history: Path | None, completions: dict[str, Any]) -> Any:
    """A `PromptSession` that reads messages, with the history of earlier chats in a private file, or without a history if that
    file cannot be opened. `completions`: for each command, what completes its argument."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            name, blank, argument = document.text_before_cursor.partition(" ")
            if not blank and name:
                yield from (Completion(known, -len(name)) for known in completions if known.startswith(name))
            elif inner := completions.get(name):
                yield from inner.get_completions(Document(argument), complete_event)

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            if not string.startswith(" "):
                with contextlib.suppress(OSError):
                    super().store_string(string)

    kept = None
    if history is not None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(history, os.O_RDWR | os.O_CREAT, 0o600))
            os.chmod(history, 0o600)
            kept = History(history)
    return PromptSession(
        multiline=True, key_bindings=_key_bindings(), history=kept, completer=Commands(), complete_while_typing=False
    )


def _key_bindings() -> Any:
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
    """Whether the text begins with a block that is not closed."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) >= 2 * len(FENCE) and text.endswith(FENCE))


def message_of(line: str) -> str:
    """The message in a typed text: the inside of a block, or the text without surrounding white space."""
    text = line.strip()
    if text.startswith(FENCE):
        return text.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return text
