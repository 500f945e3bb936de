"""Faults that were found in the chat in the terminal, each put back into our own source: its guard must fail."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

import ferrum_jax as fj
from ferrum_jax.cli import conversation, terminal, writer
from support.patching import Fault, applied
from support.tiny_gguf import write_tiny_llama
from unit.cli import test_cli_terminal as terminal_guards
from unit.text import test_conversation as guards


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fj.load(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=2048), dtype="float32")


@contextlib.contextmanager
def typed():
    """A pseudo-terminal as standard input."""
    master, slave = os.openpty()
    before = sys.stdin
    with open(slave, buffering=1) as sys.stdin:
        try:
            yield master, slave
        finally:
            sys.stdin = before
            os.close(master)


def terminal_guard(_model):
    with typed() as terminal_ends:
        terminal_guards.what_is_typed_is_kept_and_not_shown(terminal_ends)


def wrapping_guard(_model):
    with pytest.MonkeyPatch.context() as patch:
        terminal_guards.words_are_broken_as_textwrap_breaks_them(patch, 30)


FAULTS = {
    "the whole conversation is read again in every turn": Fault(
        "", conversation.open_engine, "max_seqs=1", "max_seqs=1, prefix_cache=False", guards.later_turns_cost_what_is_new
    ),
    "an answer is parted anew by the tokenizer": Fault(
        "", conversation.Transcript.said, "self._parts.append((text, ids))", "pass", guards.sampled_ids_stay
    ),
    "what is typed ahead is shown in the answer": Fault(
        "", terminal.quiet, "(termios.ECHO | termios.ICANON)", "termios.ICANON", terminal_guard
    ),
    "what is typed ahead waits for its Enter": Fault(
        "", terminal.quiet, "(termios.ECHO | termios.ICANON)", "termios.ECHO", terminal_guard
    ),
    "the terminal is left without echo": Fault(
        "", terminal.quiet, "termios.tcsetattr(terminal, termios.TCSADRAIN, before)", "pass", terminal_guard
    ),
    "words are broken at the edge": Fault(
        "", writer.Writer._place, "self._column + len(lead) + cells > width", "False", wrapping_guard
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name, model):
    fault = FAULTS[name]
    fault.guard(model)
    with applied(fault), pytest.raises(AssertionError):
        fault.guard(model)
