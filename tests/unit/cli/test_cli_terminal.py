"""The terminal around a chat: words at its edge, text typed during an answer, and its state afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import random
import re
import select
import signal
import struct
import sys
import termios
import textwrap
import time

import pytest
import wcwidth
from prompt_toolkit.output import DummyOutput

from ferrum_jax.cli import terminal, writer
from support import environment
from support.cli_fakes import child
from support.tiny_gguf import write_tiny_llama

CODE = """
import os, fcntl, termios
os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ferrum_jax.cli import chat
chat.open_engine = cli_fakes.FakeEngine
"""
ENGLISH = "The quick brown fox jumps over the lazy dog, and don’t well-known words stay whole at every edge? Yes. "


class Screen(io.StringIO):
    def isatty(self):
        return True


def shown(text, width, monkeypatch, seed=None):
    """The output for a terminal of this width, for a text that arrives in pieces."""
    monkeypatch.setattr(writer.Writer, "_width", lambda self: width)
    screen = Screen()
    out = writer.Writer(screen)
    rng = random.Random(seed)
    while text:
        count = len(text) if seed is None else rng.randint(1, 7)
        out.write(text[:count])
        text = text[count:]
    out.close()
    return screen.getvalue()


def words_are_broken_as_textwrap_breaks_them(monkeypatch, width):
    paragraphs = [ENGLISH * 3, "short", "", "a" * width + " " + "b" * (width - 1) + " c d", ENGLISH]
    expected = [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(paragraph, width, break_long_words=False, break_on_hyphens=False) or [""]
    ]
    for seed in range(5):
        assert shown("\n".join(paragraphs), width, monkeypatch, seed).rstrip().split("\n") == expected


@pytest.mark.parametrize("width", [12, 13, 30, 50, 80])
def test_words_are_broken_as_textwrap_breaks_them(monkeypatch, width):
    words_are_broken_as_textwrap_breaks_them(monkeypatch, width)


AS_IS = f"""\
```python
{ENGLISH}
    print("x" * 100)        # a comment at the end of it{" " * 9}
```
~~~~
{ENGLISH}
~~~
{ENGLISH}
~~~~
| a table | {ENGLISH} |

    code = {ENGLISH}
\t{ENGLISH}
"""


def test_code_and_tables_are_left_as_they_are(monkeypatch):
    for seed in range(5):
        assert shown(AS_IS, 40, monkeypatch, seed) == AS_IS
    items = f"- one\n    - {ENGLISH}\n      {ENGLISH}\n\n{ENGLISH}"
    assert max(map(len, shown(AS_IS + items, 40, monkeypatch).removeprefix(AS_IS).split("\n"))) <= 40


@pytest.mark.parametrize("width", [20, 21, 33])
def test_wide_characters(monkeypatch, width):
    text = (
        "她说：「你好，世界！今天天气很好，我们去公园散步吧。」 e\u0301te\u0301 👨‍👩‍👧 日本語のテキスト、そして English words。"
        * 3
    )
    out = shown(text, width, monkeypatch, 1)
    lines = out.rstrip("\n").split("\n")
    assert out.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    assert all(width - 12 <= wcwidth.wcswidth(line) <= width for line in lines[:-1])
    assert not any(line[0] in "，！。」、" or line[-1] in "「" for line in lines)


def test_a_word_longer_than_a_line_is_not_changed(monkeypatch):
    address = "https://example.org/" + "a" * 90
    for seed in range(5):
        out = shown(f"see {address} and more words", 30, monkeypatch, seed)
        assert address in out and out.endswith("and more\nwords\n")  # 110 cells: 20 of the fourth line


def test_the_width_is_that_of_the_moment(monkeypatch):
    screen, width = Screen(), [40]
    monkeypatch.setattr(writer.Writer, "_width", lambda self: width[0])
    out = writer.Writer(screen)
    out.write(ENGLISH * 2)
    before = len(screen.getvalue())
    width[0] = 20
    out.write(ENGLISH * 2)
    out.close()
    assert max(map(len, screen.getvalue()[:before].split("\n"))) <= 40
    assert max(map(len, screen.getvalue()[before:].split("\n"))) <= 20


def test_control_characters_are_shown_and_a_pipe_gets_the_text_unchanged(monkeypatch):
    text = f"a\x1b[2J\x9bb\r {ENGLISH * 3}\n\n    x"
    assert shown("a\x1b[2J\x9bb\r", 80, monkeypatch) == "a␛[2J\ufffdb␍\n"
    pipe = io.StringIO()
    out = writer.Writer(pipe)
    out.write(text)
    assert pipe.getvalue() == text
    out.close()
    assert pipe.getvalue() == text + "\n"


# What is typed


@pytest.fixture
def typed(monkeypatch):
    """Standard input is a terminal; gives the place to type, and the terminal."""
    master, slave = os.openpty()
    with open(slave, buffering=1) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield master, slave
    os.close(master)


def what_is_typed_is_kept_and_not_shown(typed):
    master, slave = typed
    before = termios.tcgetattr(slave)
    for error in (None, KeyboardInterrupt, SystemExit, RuntimeError):
        with contextlib.suppress(KeyboardInterrupt, SystemExit, RuntimeError), terminal.quiet(DummyOutput()):
            os.write(master, b"typed\r")
            assert select.select([slave], [], [], 2)[0] and os.read(slave, 100) == b"typed\r"
            if error:
                raise error
        assert termios.tcgetattr(slave) == before
        assert not select.select([master], [], [], 0)[0]


def test_what_is_typed_is_kept_and_not_shown(typed):
    what_is_typed_is_kept_and_not_shown(typed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_leaves_the_terminal_as_it_was(typed, number):
    before, handler = termios.tcgetattr(typed[1]), signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, terminal.quiet(DummyOutput()):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.code == 128 + number
    assert termios.tcgetattr(typed[1]) == before and signal.getsignal(number) is handler


def test_quiet_again_after_a_pause(typed):
    """A shell has its own modes while a job is stopped."""
    before = termios.tcgetattr(typed[1])
    with terminal.quiet(DummyOutput()):
        inside = termios.tcgetattr(typed[1])
        termios.tcsetattr(typed[1], termios.TCSANOW, before)
        os.kill(os.getpid(), signal.SIGCONT)
        assert termios.tcgetattr(typed[1]) == inside != before


# A chat in a pseudo-terminal


class Talk:
    """A chat with the fake model in another process, and its terminal."""

    def __init__(self, tmp_path, code, columns=80, *arguments, model="m"):
        self.master, self.slave = os.openpty()
        self.resize(columns)
        self.before = termios.tcgetattr(self.slave)
        variables = environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", FERRUM_JAX_CACHE=str(tmp_path))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), self.slave)
        self.process = child(
            "run", model, *arguments, code=CODE + textwrap.dedent(code), fake=model == "m", env=variables, **pipes
        )
        self.seen = ""

    def resize(self, columns):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, text):
        """The output to the terminal up to a text."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        found, self.seen = self.seen.split(text, 1)
        return found

    def ends(self, code):
        """The process ends with this code, and the terminal is restored."""
        assert self.process.wait(60) == code
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        os.close(self.master)


PASTES = "\x1b[?2004h"  # written when a line was edited
SLOW = """
cli_fakes.FakeModel.reply = "abcdefghij" * 3
cli_fakes.FakeModel.delay = 0.1
"""


@pytest.mark.slow
def test_two_turns_and_ctrl_c(tmp_path):
    talk = Talk(tmp_path, SLOW + 'cli_fakes.FakeModel.reply = "ab cd " * 9')
    talk.until(">>>")
    talk.type("hello\r")
    talk.until("ab cd ab")
    talk.type("\x03")
    talk.until("[stopped]")
    talk.until(">>>")
    talk.type("again\r")
    talk.until("ab cd " * 8)
    talk.until(">>>")
    talk.type("\x04")
    talk.ends(0)


@pytest.mark.slow
def test_turns_with_a_model(tmp_path):
    file = write_tiny_llama(tmp_path / "tiny.gguf", context=512)
    talk = Talk(tmp_path, "", 80, "--stats", "--seed", "1", "--max-tokens", "40", model=str(file))
    for text, most in (("hello there " * 9, None), ("and then", 17 + 30)):
        talk.until(">>>")
        talk.type(f"{text}\r")
        prompt, before = re.search(r"prompt (\d+) tokens(?: \((\d+) read before\))?", talk.until(" compile ")).groups()
        assert most is None or int(prompt) - int(before) <= most
    talk.until(">>>")
    talk.type("/bye\r")
    talk.ends(0)


@pytest.mark.slow
def test_what_is_pasted_ahead_is_one_message(tmp_path):
    talk = Talk(tmp_path, SLOW)
    talk.until(">>>")
    talk.type("hello\r")
    talk.until(PASTES + "abc")
    talk.type("\x1b[200~one\rtwo\x1b[201~\r")
    talk.until("two")
    talk.until(PASTES + "abc")
    talk.until(">>>")
    talk.type("\x04")
    talk.ends(0)
    assert "two" not in talk.seen


@pytest.mark.slow
def test_what_is_typed_ahead_is_the_next_message(tmp_path):
    talk = Talk(tmp_path, SLOW + 'cli_fakes.FakeModel.reply = "ab cd " * 9')
    talk.until(">>>")
    talk.type("hello\r")
    talk.until("ab cd")
    talk.type("typed\x7fahead\rand")
    time.sleep(0.3)
    talk.type("\x03")  # what was typed is kept
    assert "type" not in talk.until("[stopped]")
    assert "typeahead" in talk.until("ab cd " * 8)
    talk.until(">>>")
    talk.until("and")
    talk.type("\x03\x04")
    talk.ends(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("answering", [False, True])
def test_killed(tmp_path, number, code, answering):
    talk = Talk(tmp_path, SLOW + 'cli_fakes.FakeModel.reply = "ab cd " * 99')
    talk.until(">>>")
    if answering:
        talk.type("hello\r")
        talk.until("ab cd")
    talk.process.send_signal(number)
    talk.ends(code)


def test_a_failure_of_ours(tmp_path):
    talk = Talk(tmp_path, "cli_fakes.FakeModel.render_chat = None")
    talk.until(">>>")
    talk.type("hello\r")
    talk.until("internal error: TypeError")
    talk.ends(1)


@pytest.mark.slow
def test_words_in_a_terminal_that_changes(tmp_path):
    code = f"cli_fakes.FakeModel.reply, cli_fakes.FakeModel.delay = {ENGLISH!r} * 12, 0.002"
    talk = Talk(tmp_path, code, 50, "--max-seq-len", "5000", "--max-tokens", "4000")
    talk.until(">>>")
    talk.type("hello\r")
    talk.until(PASTES)
    first = talk.until("Yes.").split("\r\n")
    assert max(map(len, first)) <= 50 and len(first) > 2 and all(word in ENGLISH for line in first for word in line.split())
    talk.resize(30)
    rest = talk.until(">>>").split("\r\n")
    assert max(map(len, rest[-21:-1])) <= 30
    talk.type("\x04")
    talk.ends(0)
