"""Answers of models into reasoning, content and calls: what templates write is read again, wherever the text is cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pydantic_core
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum_jax import chat
from ferrum_jax.parsing import Answer, Dialect, Parser, Tools
from support.dialects import CASES

PROPERTIES = {
    "a": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "number"}, "yes": {"type": "boolean"},
    "some": {"type": "array", "items": {"type": "integer"}}, "deep": {"type": "object"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}}
ARGUMENTS = {
    "a": 'Zürich "x" \\ <b>\n\n  两\n',
    "n": -3,
    "x": 2.5,
    "yes": True,
    "some": [1, 2],
    "deep": {"k": [None, {"l": "m"}]},
    "maybe": "5",
}
USER = {"role": "user", "content": "Hi"}


def parser(name: str, prompt: str = "", **more: Any) -> Parser:
    case = CASES[name]
    return Parser(Dialect(case.calls, case.reasoning), Tools.of([TOOL], lambda: "id"), prompt=prompt, **more)


def pieces(parser: Parser, text: str, cuts: list[int]) -> Answer:
    answer, places = Answer(), [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        answer.add(parser.push(text[start:end]))
    return answer.add(parser.end())


def written(name: str, message: dict[str, Any]) -> tuple[str, str]:
    """The prompt, and the answer that a template writes after it."""
    template, fixed = CASES[name].template, {"bos_token": "", "eos_token": "<eos>"}
    prompt = chat.render(template, [USER], **fixed)
    whole = chat.render(template, [USER, {"role": "assistant", **message}], add_generation_prompt=False, **fixed)
    assert whole.startswith(prompt)
    return prompt, re.sub(r"(<eos>|<\|im_end\|>|<\|eot_id\|>|<\|return\|>|<\|call\|>)\s*$", "", whole[len(prompt) :])


def call(arguments: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"id": "abcdef123", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("name", CASES)
def test_a_template_says_how_its_model_writes(name: str) -> None:
    assert Dialect.of(CASES[name].template) == Dialect(CASES[name].calls, CASES[name].reasoning)
    assert Dialect.of(CASES[name].template, "llama", "none") == Dialect("llama", "none")
    with pytest.raises(ValueError, match="tool parser: 'x' is not known; there is qwen_xml, "):
        Dialect.of(None, "x")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_a_template_writes_is_read_again(name: str, count: int) -> None:
    given = [ARGUMENTS, {"n": 1}][:count]
    if count == 2 and name == "llama":
        pytest.skip("its template has one call at a time")
    message: dict[str, Any] = {"content": "" if count else " Well. "}
    if count:
        message["tool_calls"] = [call(each) for each in given]
    if CASES[name].reasoning != "none":
        message["reasoning_content"] = "Hm.\n\nWell <b>"
    prompt, text = written(name, message)
    answer = parser(name, prompt).whole(text)
    assert answer.reasoning == message.get("reasoning_content", "")
    assert answer.content.strip() == message["content"].strip() and len(answer.calls) == count
    assert [json.loads(called.arguments) for called in answer.calls] == given
    assert all(called.name == "f" and called.complete for called in answer.calls)


@pytest.mark.parametrize("name", CASES)
def test_calls_come_with_content_and_end_anywhere(name: str) -> None:
    """Whatever is cut off, the rest is a prefix: nothing of it is lost or told twice."""
    if name in ("llama", "mistral"):
        pytest.skip("their templates do not write both")
    prompt, text = written(name, {"content": "Let me see.", "tool_calls": [call({"a": "x y", "n": 1}), call({"a": ""})]})
    whole = parser(name, prompt).whole(text)
    assert whole.content.strip() == "Let me see." and len(whole.calls) == 2
    for end in range(len(text)):
        part = parser(name, prompt).whole(text[:end])
        assert len(part.calls) <= 2
        for called, full in zip(part.calls, whole.calls, strict=False):
            assert not called.complete or called.arguments == full.arguments
            pydantic_core.from_json(called.arguments or "{}", allow_partial="trailing-strings")


SEARCH = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.sampled_from(
    [" ", "\n", "so", '"', "{", "}", "<", "</", "[", "\\", "é", "<think>", "</think>", "<think>\n", "\n</think>\n\n"]
)


@st.composite
def texts(draw: Any) -> tuple[str, str, list[int], bool]:
    name = draw(st.sampled_from(list(CASES)))
    part = st.one_of(st.sampled_from(CASES[name].parts), WORDS)
    text = "".join(draw(st.lists(part, max_size=14)))
    return name, text, draw(st.lists(st.integers(0, 200), max_size=8)), draw(st.booleans())


@SEARCH
@given(texts())
def test_it_does_not_matter_where_a_text_is_cut(drawn: tuple[str, str, list[int], bool]) -> None:
    name, text, cuts, opened = drawn
    prompt = "<think>\n" if opened else ""
    whole = parser(name, prompt).whole(text)
    assert pieces(parser(name, prompt), text, cuts) == whole
    assert pieces(parser(name, prompt), text, list(range(len(text)))) == whole
    for called in whole.calls:
        assert called.name
        if called.complete:
            assert isinstance(json.loads(called.arguments), dict)
        else:
            pydantic_core.from_json(called.arguments or "{}", allow_partial="trailing-strings")


@SEARCH
@given(texts())
def test_nothing_is_lost(drawn: tuple[str, str, list[int], bool]) -> None:
    """Each word comes out somewhere, except in the headers of harmony's messages and the ids of calls."""
    name, text, cuts, _ = drawn
    if name == "harmony" or "CALL_ID" in text:
        return
    places = sorted(cut % (len(text) + 1) for cut in cuts)
    marked = text
    for i, place in reversed(list(enumerate(places))):
        marked = f"{marked[:place]}word{i}{marked[place:]}"
    answer = parser(name).whole(marked)
    told = answer.reasoning + answer.content + "".join(called.id + called.name + called.arguments for called in answer.calls)
    assert [f"word{i}" for i in range(len(places)) if f"word{i}" not in told] == []


@SEARCH
@given(st.text(), st.sampled_from(list(CASES)))
def test_plain_texts_stay_as_they_are(text: str, name: str) -> None:
    answer = Parser(Dialect(CASES[name].calls, CASES[name].reasoning)).whole(text)
    assert answer.content == text or name == "harmony"
