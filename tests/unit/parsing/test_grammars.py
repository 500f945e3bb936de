"""Grammars of forced calls: whatever a model writes under them is read as calls whose arguments match."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import llguidance
import pytest

from ferrum_jax import chat
from ferrum_jax.parsing import Dialect, Parser, Tools, grammars
from ferrum_jax.structured import Structured
from support.dialects import CASES

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["town", "days"],
    "properties": {
        "town": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "kind": {"type": "string", "enum": ["short", "long"]}, "on": {"type": "boolean"},
        "some": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2},
    },
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip
SCHEMAS: dict[str, Any] = {"weather": SCHEMA, "stop": {}}
TOOLS = [{"function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
FORMATS = [name for name in CASES if name not in ("gemma",)]
END = 256


class Bytes:
    """A vocabulary of bytes, an end token, and the marks of a format as control tokens."""

    is_tokenizer_wrapper, eos_token_id, bos_token_id = True, END, None

    def __init__(self, marks: list[str]):
        self.tokens = [bytes([i]) for i in range(256)] + [b"<end>"] + [mark.encode() for mark in marks]
        self.special_token_ids = list(range(END, len(self.tokens)))
        self.marks = {mark: END + 1 + i for i, mark in enumerate(marks)}

    def __call__(self, text: bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_grammar_admits_is_read_as_calls(name: str, control: bool) -> None:
    dialect = Dialect(CASES[name].calls, CASES[name].reasoning)
    marks = [mark for mark in dialect.marks if control and mark.strip() == mark]
    vocabulary = Bytes(marks)
    tokenizer = llguidance.LLTokenizer(vocabulary)
    rng = random.Random(5)
    for parallel, opened in ((True, False), (False, True)):
        opened = opened and dialect.thinking is not None
        given = {"parallel": parallel, "thinks": True, "opened": opened}
        lark = grammars.answer(dialect, SCHEMAS, vocabulary.marks, forced=True, **given)
        assert lark is not None
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        for _ in range(3):
            text = written(llguidance.LLMatcher(tokenizer, grammar, log_level=0), vocabulary, rng)
            prompt = dialect.thinking.open if opened and dialect.thinking else ""
            answer = Parser(dialect, Tools.of(TOOLS), prompt=prompt).whole(text)
            assert answer.calls and not answer.content, text
            assert parallel or len(answer.calls) == 1
            for call in answer.calls:
                assert call.complete, text
                given = json.loads(call.arguments)
                jsonschema.validate(given, SCHEMAS[call.name] or {"type": "object"})


def written(matcher: Any, vocabulary: Bytes, rng: random.Random) -> str:
    """A text that a model without a mind writes. It likes to come to ends: in free texts it tries what may end them."""
    tried = ("</think>", "[/THINK]", "\n</parameter>\n", "</arg_value>\n", "<|end|>", "<channel|>")
    text, marks = b"", [mark.encode() for mark in tried if mark.strip() not in vocabulary.marks]
    while not matcher.is_stopped() and len(text) < 3000:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(len(vocabulary.tokens)) if mask[token // 8] >> token % 8 & 1]
        assert allowed, (text, matcher.get_error())
        ends = [token for token in allowed if token >= END or chr(token) in '"}<\n]']
        plain = [token for token in allowed if token < 127] or allowed
        free = marks and len(allowed) > 100 and rng.random() < 0.1
        following = [*rng.choice(marks)] if free else [rng.choice(ends if ends and rng.random() < 0.5 else plain)]
        for token in following:
            if token == END:
                return text.decode()
            if matcher.is_stopped() or not matcher.validate_tokens([token]):
                break
            matcher.consume_token(token)
            text += vocabulary.tokens[token]
    assert matcher.is_stopped(), text
    return text.decode()


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gemma", "harmony"])
def test_a_format_is_that_of_the_content_after_reasoning(name: str, control: bool) -> None:
    dialect = Dialect(CASES[name].calls, CASES[name].reasoning)
    vocabulary = Bytes([mark for mark in dialect.marks if control and mark.strip() == mark])
    tokenizer, rng, reasoned = llguidance.LLTokenizer(vocabulary), random.Random(3), 0
    for given, right in (
        (Structured(json_schema={"enum": ["a/b", 5]}), r'"a/b"|5'),
        (Structured(regex=r"[/ab]{2}\/c"), r"[/ab]{2}/c"),
        (Structured(choice=["yes/\n", '"no"']), 'yes/\n|"no"'),
        (Structured(lark='start: one | TWO\none: %json {"const": 1}\nTWO: /[2]/'), "[12]"),
    ):
        for opened in {False, dialect.thinking is not None}:
            lark = grammars.after_reasoning(dialect, given.rule, vocabulary.marks, thinks=True, opened=opened)
            assert lark is not None
            prompt = dialect.thinking.open if opened and dialect.thinking else ""
            for _ in range(4):
                matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
                answer = Parser(dialect, prompt=prompt).whole(written(matcher, vocabulary, rng))
                assert re.fullmatch(right.strip(), answer.content), (lark, answer)
                reasoned += bool(answer.reasoning)
    assert reasoned > 5
    assert grammars.after_reasoning(dialect, "TEXT", {}, thinks=False, opened=False) is None


def test_some_formats_do_not_have_a_grammar() -> None:
    given: dict[str, Any] = {"parallel": True, "thinks": False, "opened": False}
    for calls, forced in [("none", True), ("gemma", True), ("llama", False), ("harmony", False), ("lfm", False)]:
        assert grammars.answer(Dialect(calls), SCHEMAS, {}, forced=forced, **given) is None


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("llama", "harmony", "lfm")])
def test_calls_that_are_not_forced_match_as_well(name: str, control: bool) -> None:
    dialect = Dialect(CASES[name].calls)
    vocabulary = Bytes([mark for mark in dialect.marks if control])
    given: dict[str, Any] = {"parallel": True, "thinks": False, "opened": False}
    lark = grammars.answer(dialect, SCHEMAS, vocabulary.marks, forced=False, **given)
    assert lark is not None
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)

    def admits(text: str) -> bool:
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer(vocabulary), grammar, log_level=0)
        split = re.split("(" + "|".join(map(re.escape, vocabulary.marks)) + ")", text) if vocabulary.marks else [text]
        tokens = [t for part in split for t in ([vocabulary.marks[part]] if part in vocabulary.marks else part.encode())]
        return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()

    template = CASES[name].template
    calls = [{"id": "abcdef123", "function": {"name": "weather", "arguments": {"town": "a", "days": days}}} for days in (3, 10)]

    def written(calls: list[Any]) -> str:
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        user = {"role": "user", "content": "Hi"}
        text = chat.render(template, [user, turn], add_generation_prompt=False, bos_token="", eos_token="<eos>")
        start = min(text.index(mark) for mark in dialect.marks if mark in text)
        return re.sub(r"(<eos>|<\|im_end\|>)\s*$", "", text[start:])

    assert admits("Well.") and admits("Well.\n" + written(calls[:1]))
    assert not admits(written(calls[1:])), "days is at most 9"
