"""The chat in the terminal: what it keeps, what keys do, and its message when an answer is cut."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
import types

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

import ferrum_jax as fj
from ferrum_jax.cli import chat, commands
from ferrum_jax.cli import terminal as terminal_module
from ferrum_jax.cli.run import run_command
from support.cli_fakes import FakeEngine, FakeModel, FakeStream


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A fake instead of the engine, and without the user's history."""
    monkeypatch.setattr(chat, "open_engine", FakeEngine)
    monkeypatch.setenv("FERRUM_JAX_CACHE", str(tmp_path / "cache"))


@contextlib.contextmanager
def terminal():
    """Typed text for prompt_toolkit, without a terminal."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed


def chatting(fake, typed_text, **options):
    talk = chat.Chat(fake, fj.SamplingParams(max_tokens=50), **{"template": {}} | options)
    with terminal() as typed:
        typed.send_text(typed_text)
        talk.run("fake")
    return talk


def roles(talk):
    """The messages, the system message first."""
    talk = talk.conversation
    opening = [("system", talk.system)] if talk.system is not None else []
    return opening + [(message["role"], message["content"]) for message in talk.messages]


def until_closed(stream):
    while not stream.closed:
        time.sleep(0.01)


def test_chat_keeps_the_conversation(capsys):
    talk = chatting(FakeModel("m"), "one\rtwo\r/bye\r", system="s")
    assert roles(talk) == [
        ("system", "s"), ("user", "one"), ("assistant", "two words"), ("user", "two"), ("assistant", "two words"),
    ]  # fmt: skip
    assert [len(messages) for messages, _ in talk.conversation.model.asked] == [2, 4]
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
    assert "not sent: 75 tokens do not fit into a context of 40" in out and "The conversation has not changed." in out
    assert len(talk.conversation.model.streams) == 1


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
                        until_closed(self)
                    return step()

            made.__class__ = Interrupted
        return made

    fake.stream = stream
    talk = chatting(fake, "one\rtwo\r\x04")
    assert roles(talk) == [("user", "one"), ("assistant", "two"), ("user", "two"), ("assistant", "two words")]
    assert fake.streams[0].closed and "[stopped]" in capsys.readouterr().out


def interrupting(times):
    """A stream whose first step is interrupted before it gives anything."""

    class Interrupted(FakeStream):
        def __next__(self):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            until_closed(self)
            raise StopIteration

    return lambda ids, params, adapter: Interrupted("", ids, params, 0, True)


@pytest.mark.parametrize("times", [1, 5])
def test_chat_ctrl_c_before_the_answer_begins(capsys, times):
    fake = FakeModel("m")
    fake.stream = interrupting(times)
    talk = chatting(fake, "one\r\x04")
    assert roles(talk) == [] and "stopped before" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_without_a_template(capsys):
    talk = chatting(FakeModel("m"), "one\rtwo\r\x04", template=None)
    model = talk.conversation.model
    assert roles(talk) == [] and model.asked == []
    assert [stream.prompt_token_ids for stream in model.streams] == [
        model.tokenizer.encode("one"), model.tokenizer.encode("two"),
    ]  # fmt: skip


def test_chat_survives_what_the_template_refuses(capsys):
    fake = FakeModel("m")

    def refuse(messages, **_template):
        raise ValueError("roles must alternate")

    fake.render_chat = refuse
    talk = chatting(fake, "one\r\x04")
    assert roles(talk) == [] and "roles must alternate" in capsys.readouterr().out


def test_chat_says_that_an_answer_failed(capsys, monkeypatch):
    class Failing(FakeEngine):
        def submit(self, ids, params, adapter=None):
            request = super().submit(ids, params, adapter)
            request.finish_reason, request.error = "error", "the model's logits are not finite"
            return request

    monkeypatch.setattr(chat, "open_engine", Failing)
    talk = chatting(FakeModel("m"), "one\r\x04")
    assert roles(talk) == [] and "[failed: the model's logits are not finite;" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "given"), [(None, 196), (10**9, 196), (50, 50)])
def test_an_answer_may_be_as_long_as_the_context_leaves(asked, given):
    """Whether max_tokens is None, or more than the rest of the context."""
    params = types.SimpleNamespace(max_tokens=asked)
    made = dataclasses.make_dataclass("Params", ["max_tokens", ("ignore_eos", bool, False)])(asked)
    fake = FakeModel("m")
    chat.Chat(fake, made, template={}).answer([{"role": "user", "content": "one"}])
    assert fake.params.max_tokens == given and params.max_tokens == asked


# Commands


def test_regenerate_answers_the_same_message_again(capsys):
    fake = FakeModel("m")
    talk = chatting(fake, "/regenerate\rone\rtwo\r/regenerate\r/regenerate\r/bye\r")
    assert [role for role, _ in roles(talk)] == ["user", "assistant"] * 2
    assert [len(messages) for messages, _ in fake.asked] == [1, 3, 3, 3]
    assert "There is no message to regenerate yet." in capsys.readouterr().out


def test_regenerate_without_a_template():
    talk = chatting(FakeModel("m"), "one\r/regenerate\r/bye\r", template=None)
    first, second = talk.conversation.model.streams
    assert first.prompt_token_ids == second.prompt_token_ids


def test_save_and_load(capsys, tmp_path):
    file = tmp_path / "with blank.json"
    talk = chatting(FakeModel("m"), f"one\r/save {file}\rtwo\r/save {file}\r/bye\r", system="s")
    assert json.loads(file.read_text())["messages"] == [
        {"role": role, "content": content} for role, content in roles(talk)
    ]  # fmt: skip
    other = chatting(FakeModel("m"), f"x\r/load {file}\r/regenerate\r/bye\r")
    assert roles(other) == roles(talk)
    assert f"4 messages from {file}" in capsys.readouterr().out.replace("\n", " ")
    assert os.listdir(tmp_path / "cache") == ["history"] and sorted(os.listdir(tmp_path)) == ["cache", file.name]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("no JSON", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("{}", 'does not have a list under "messages"'),
        ('[{"role": "user"}]', 'message 0 does not have a text under "role" and "content"'),
    ],
)
def test_load_of_something_else(capsys, tmp_path, content, said):
    file = tmp_path / "f.json"
    if content is not None:
        file.write_text(content)
    talk = chatting(FakeModel("m"), f"one\r/load {file}\r/save {file}\r/bye\r")
    out = capsys.readouterr().out
    assert "not loaded: " in out and said in out and len(roles(talk)) == 2
    if content is not None:  # it is not overwritten
        assert "not saved: " in out and file.read_text() == content


def test_set(capsys):
    lines = (
        "/set", "/set temperature 0.25", "/set top_k 5", "/set temperature hot", "/set stop END", '/set stop ["a", "5"]',
        "/set seed 7", "/set seed none", "/set nonsense 1", "/set max_tokens 4", "/set max_tokens",
        "/set think off", "/set system Be  brief.", "one",
    )  # fmt: skip
    fake = FakeModel("m")
    talk = chatting(fake, "".join(f"{line}\r" for line in lines) + "\x04", system="s")
    out = capsys.readouterr().out
    params = talk.conversation.params
    assert (params.temperature, params.top_k, params.stop, params.seed, params.max_tokens) == (0.25, 5, ("a", "5"), None, 50)
    assert "not set: SamplingParams.temperature must be a finite number" in out
    assert out.count("you can set: max_tokens, temperature,") == 2 and "system, enable_thinking" in out
    assert 'stop: ["END"]' in out and "seed: none" in out and "enable_thinking: off" in out
    assert fake.asked[-1][1] == {"enable_thinking": False}
    assert roles(talk)[0] == ("system", "Be  brief.")
    commands.obey(talk, "/set think")
    commands.obey(talk, "/set system")
    assert talk.conversation.template == {} and talk.conversation.system == "s"
    commands.obey(talk, '/set system ""')
    assert talk.conversation.system is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/save", "/save FILE"),
        ("/clear all", "/clear does not take an argument"),
        ("/\x1b[2J", "unknown command /"),
    ],
)
def test_commands_that_are_not_complete(capsys, line, said):
    assert commands.obey(chat.Chat(FakeModel("m"), fj.SamplingParams(), template={}), line)
    assert said in capsys.readouterr().out


def test_save_without_a_template(capsys, tmp_path):
    chatting(FakeModel("m"), f"one\r/save {tmp_path}/f\r/bye\r", template=None)
    assert "This model does not have a chat template, so there is no conversation." in capsys.readouterr().out
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("/s", ["/set", "/show", "/save"]),
        ("/set te", ["/set temperature"]),
        ("/set enable", ["/set enable_thinking"]),
        ("/load {folder}/ta", ["/load {folder}/talk.json"]),
        ("/clear s", []),
        ("s", []),
    ],
)
def test_tab_completes_commands_and_what_they_take(tmp_path, line, completed):
    (tmp_path / "talk.json").touch()
    talk = chat.Chat(FakeModel("m"), fj.SamplingParams(), template={})
    editor = terminal_module.line_editor(None, {name: command.completions(talk) for name, command in commands.COMMANDS.items()})
    line = line.format(folder=tmp_path)
    found = editor.completer.get_completions(Document(line), CompleteEvent(completion_requested=True))
    made = [line[: len(line) + choice.start_position] + choice.text for choice in found]
    assert made == [text.format(folder=tmp_path) for text in completed]


# History


def test_history_of_earlier_chats(tmp_path):
    file = tmp_path / "cache" / "history"
    chatting(FakeModel("m"), "one\r secret\r/bye\r")
    assert (file.stat().st_mode & 0o777, "secret" in file.read_text()) == (0o600, False)
    os.chmod(file, 0o644)
    up = "\x1b[A"
    talk = chatting(FakeModel("m"), f"{up}{up}\r\x04")
    assert roles(talk)[0] == ("user", "one")
    assert file.stat().st_mode & 0o777 == 0o600


def test_history_can_be_turned_off(tmp_path):
    chatting(FakeModel("m"), "one\r/bye\r", history=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "kept"),
    [([], None, True), (["--no-history"], "1", False), ([], "0", False), ([], "off", False)],
)
def test_the_history_switch(monkeypatch, arguments, environment, kept):
    if environment is not None:
        monkeypatch.setenv("FERRUM_JAX_HISTORY", environment)
    assert run_command.make_context("run", arguments, obj={"debug": False}).params["history"] is kept


@pytest.mark.parametrize("spoilt", ["a folder", "no folder"])
def test_history_that_cannot_be_kept_stops_nothing(tmp_path, spoilt):
    if spoilt == "a folder":
        (tmp_path / "cache" / "history").mkdir(parents=True)
    else:
        (tmp_path / "cache").write_text("")
    assert len(roles(chatting(FakeModel("m"), "one\r/bye\r"))) == 2
