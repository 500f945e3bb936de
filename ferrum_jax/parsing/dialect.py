"""How a model writes its reasoning and its calls: chosen from its chat template, or by name."""

from __future__ import annotations

import dataclasses
import secrets
import string
from collections.abc import Callable
from typing import NamedTuple

from ferrum_jax.parsing import formats, harmony
from ferrum_jax.parsing.formats import Format

HARMONY = "harmony"
NONE = "none"


class Thinking(NamedTuple):
    """The marks around reasoning."""

    open: str
    close: str


THINKING = {
    "think": Thinking("<think>", "</think>"),
    "seed": Thinking("<seed:think>", "</seed:think>"),
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "gemma": Thinking("<|channel>thought\n", "<channel|>"),
}
_HERMES = ("<tool_call>", "<tool_calls>", "<TOOLCALL>", "<|tool_call|>")
_MISTRAL = Format(("[TOOL_CALLS]",), formats.mistral, inside=("[ARGS]", "[CALL_ID]"))
_DEEPSEEK = Format(
    ("<｜tool▁call▁begin｜>",), formats.deepseek, noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    inside=("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)  # fmt: skip
FORMATS = {
    "qwen_xml": Format(
        ("<tool_call>", "<function="), formats.qwen_xml, noise=("<seed:tool_call>", "</seed:tool_call>"),
        inside=("</tool_call>",),
    ),
    "glm": Format(
        ("<tool_call>",), formats.glm, inside=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    ),
    "mistral_named": _MISTRAL,
    "mistral": _MISTRAL,
    "deepseek_old": _DEEPSEEK,
    "deepseek": _DEEPSEEK,
    "kimi": Format(
        ("<|tool_call_begin|>",), formats.kimi, noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        inside=("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    "lfm": Format(("<|tool_call_start|>",), formats.lfm, inside=("<|tool_call_end|>",)),
    "gemma": Format(("<|tool_call>",), formats.gemma, inside=('<|"|>', "<tool_call|>")),
    "hermes": Format(_HERMES, formats.hermes, inside=tuple(mark.replace("<", "</") for mark in _HERMES)),
    "llama": Format(("<|python_tag|>",), formats.llama, bare=formats.llama_bare),
}  # fmt: skip
# What only templates of a format contain, in the order in which they are tried: all of the texts.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen_xml", ("<function=", "<parameter=")),
    ("glm", ("<arg_key>",)),
    ("mistral_named", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_old", ("<｜tool▁sep｜>", "```json")),
    ("deepseek", ("<｜tool▁sep｜>",)),
    ("kimi", ("<|tool_call_argument_begin|>",)),
    ("lfm", ("<|tool_list_start|>",)),
    ("gemma", ("<|tool_call>",)),
    *(("hermes", (mark,)) for mark in _HERMES),
    ("llama", ("<|python_tag|>",)),
    ("llama", ("ipython", '"parameters": ')),
)
CALL_NAMES = (*FORMATS, HARMONY, NONE)
REASONING_NAMES = (*THINKING, HARMONY, NONE)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a model writes. `calls`: of CALL_NAMES; `reasoning`: of REASONING_NAMES."""

    calls: str = NONE
    reasoning: str = NONE

    @classmethod
    def of(cls, template: str | None, calls: str | None = None, reasoning: str | None = None) -> Dialect:
        """That of a chat template.

        Args:
          template: None if there is none.
          calls: the name of a format instead of the template's.
          reasoning: the same for reasoning.

        Raises:
          ValueError: if `calls` or `reasoning` is not the name of a format.
        """
        for name, known, what in ((calls, CALL_NAMES, "tool parser"), (reasoning, REASONING_NAMES, "reasoning parser")):
            if name is not None and name not in known:
                raise ValueError(f"{what}: {name!r} is not known; there is {', '.join(known)}")
        text = template or ""
        if harmony.CHANNEL in text and harmony.MESSAGE in text:
            found = cls(HARMONY, HARMONY)
        else:
            found = cls(
                next((name for name, signs in _SIGNS if all(sign in text for sign in signs)), NONE),
                next((name for name, marks in THINKING.items() if marks.close in text), NONE),
            )
        return cls(calls or found.calls, reasoning or found.reasoning)

    @property
    def format(self) -> Format | None:
        return FORMATS.get(self.calls)

    @property
    def thinking(self) -> Thinking | None:
        return THINKING.get(self.reasoning)

    @property
    def is_harmony(self) -> bool:
        return HARMONY in (self.calls, self.reasoning)

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that a parser has to see, even if they are control tokens."""
        how = self.format
        calls = how.opens + how.noise + how.inside if how else ()
        return calls + (self.thinking or ()) + (harmony.MARKS if self.is_harmony else ())

    @property
    def new_id(self) -> Callable[[], str] | None:
        """Makes the id of a call, where templates take only certain ones."""
        letters = string.ascii_letters + string.digits
        return (lambda: "".join(secrets.choice(letters) for _ in range(9))) if self.calls.startswith("mistral") else None
