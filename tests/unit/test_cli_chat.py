"""The chat in the terminal: what is kept, what keys do, and what it says when an answer is cut."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

import pytest
from cli_fakes import FakeModel, FakeParams, FakeStream, child

from ferrum_jax.cli import chat


@contextlib.contextmanager
def terminal():
    """Typed text for prompt_toolkit, without a terminal."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed


def chatting(fake, typed_text, **options):
    talk = chat.Chat(fake, FakeParams(max_tokens=50), **{"template": {}} | options)
    with terminal() as typed:
        typed.send_text(typed_text)
        talk.run("fake")
    return talk


def roles(talk):
    return [(message["role"], message["content"]) for message in talk.messages]


def test_chat_keeps_the_conversation(capsys):
    talk = chatting(FakeModel("m"), "one\rtwo\r/bye\r", system="s")
    assert roles(talk) == [
        ("system", "s"), ("user", "one"), ("assistant", "two words"), ("user", "two"), ("assistant", "two words"),
    ]  # fmt: skip
    assert [len(messages) for messages, _ in talk.model.asked] == [2, 4]
    assert capsys.readouterr().out.count("two words\n") == 2


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a\\\rb\r", "a\nb"),
        ("a\x1b\rb\r", "a\nb"),
        ('"""a\r\rb"""\r', "a\n\nb"),
        ('"""\rb\r"""\r', "b"),
        ('"""b"""\r', "b"),
        ('"""\r/bye\r"""\r', "/bye"),
        (" /etc\r", "/etc"),
        ("  \rx\r", "x"),
    ],
)
def test_chat_multi_line(typed, message):
    talk = chatting(FakeModel("m"), typed + "\x04")
    assert roles(talk) == [("user", message), ("assistant", "two words")]


def test_chat_commands(capsys):
    talk = chatting(FakeModel("m"), "one\r/clear\r/fly me\r/help\r/bye\rnever\r", system="s")
    out = capsys.readouterr().out
    assert roles(talk) == [("system", "s")]
    assert "unknown command /fly" in out and "/clear" in out and "never" not in out


def test_chat_ctrl_c_at_the_prompt(capsys):
    talk = chatting(FakeModel("m"), "\x03half\x03whole\r\x04")
    assert roles(talk)[0] == ("user", "whole")
    assert capsys.readouterr().out.count("Ctrl-D or /bye leaves") == 1


def test_chat_that_outgrows_the_context_drops_nothing(capsys):
    talk = chatting(FakeModel("m", max_seq_len=40), "one\r" + "x" * 60 + "\r\x04")
    assert roles(talk) == [("user", "one"), ("assistant", "two words")]
    out = capsys.readouterr().out
    assert "not sent: 75 tokens do not fit into a context of 40" in out and "nothing was dropped" in out
    assert len(talk.model.streams) == 1


def test_chat_says_why_an_answer_was_cut(capsys):
    fake = FakeModel("m")
    fake.reply = "x" * 80
    chatting(fake, "one\r\x04")
    assert "[cut by --max-tokens]" in capsys.readouterr().out
    fake.max_seq_len = 54
    chatting(fake, "one\r\x04")
    assert "[cut: the context of 54 tokens is full]" in capsys.readouterr().out


def test_chat_ctrl_c_stops_the_answer_only(capsys):
    fake = FakeModel("m")
    inner = fake.stream

    def stream(ids, params, adapter=None):
        made = inner(ids, params)
        if len(fake.streams) == 1:
            step = made.__next__

            class Interrupted(FakeStream):
                def __next__(self):
                    if len(self.token_ids) == 3:
                        os.kill(os.getpid(), signal.SIGINT)
                    return step()

            made.__class__ = Interrupted
        return made

    fake.stream = stream
    talk = chatting(fake, "one\rtwo\r\x04")
    assert roles(talk) == [("user", "one"), ("assistant", "two "), ("user", "two"), ("assistant", "two words")]
    assert fake.streams[0].closed and "[stopped]" in capsys.readouterr().out


def test_chat_ctrl_c_twice_breaks_into_a_step(capsys):
    fake = FakeModel("m")

    class Hanging(FakeStream):
        def __next__(self):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    fake.stream = lambda ids, params, adapter: Hanging("", ids, params, 0, True)
    talk = chatting(fake, "one\r\x04")
    assert talk.messages == [] and "stopped before" in capsys.readouterr().out


def test_chat_without_a_template(capsys):
    talk = chatting(FakeModel("m"), "one\rtwo\r\x04", template=None)
    assert talk.messages == [] and talk.model.asked == []
    assert [stream.prompt_token_ids for stream in talk.model.streams] == [
        talk.model.tokenizer.encode("one"), talk.model.tokenizer.encode("two"),
    ]  # fmt: skip


def test_chat_survives_what_the_template_refuses(capsys):
    fake = FakeModel("m")

    def refuse(messages, **_template):
        raise ValueError("roles must alternate")

    fake.encode_chat = refuse
    talk = chatting(fake, "one\r\x04")
    assert talk.messages == [] and "roles must alternate" in capsys.readouterr().out


def test_chat_shows_control_characters_harmlessly(capsys):
    chat.Chat.show("a\x1b[2J\x9bb\n", [])
    assert capsys.readouterr().out == "a␛[2J\ufffdb\n"


def test_chat_in_a_real_terminal():
    """A pseudo-terminal: two turns, Ctrl-C during the first, then Ctrl-D."""
    import pty

    master, slave = pty.openpty()
    code = """
        import os, fcntl, termios
        os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        cli_fakes.FakeModel.reply = "abcdefghij" * 3
        cli_fakes.FakeModel.delay = 0.1
    """
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = child("run", "m", code=code, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = ""

    def until(text):
        nonlocal seen
        deadline = time.monotonic() + 30
        while text not in seen:
            assert select.select([master], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(master, 4096).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    until(">>>")
    os.write(master, b"hello\r")
    until("abc")
    os.write(master, b"\x03")
    until("[stopped]")
    until(">>>")
    os.write(master, b"again\r")
    until("hij" + "abcdefghij" * 2)
    until(">>>")
    os.write(master, b"\x04")
    assert process.wait(30) == 0
    os.close(master)
