"""Chat rendering against transformers' (goldens made by tests/goldens/scripts/make_chat_goldens.py), and its errors."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ferrum_jax import chat
from ferrum_jax.errors import ModelFileError, UnsupportedModelError

GOLDENS = json.loads(gzip.decompress((Path(__file__).parents[1] / "goldens/chat/goldens.json.gz").read_bytes()))
USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", GOLDENS["templates"])
def test_equals_transformers(template: str) -> None:
    cases = [case for case in GOLDENS["cases"] if case["template"] == template]
    assert len(cases) >= 30
    for case in cases:
        messages = GOLDENS["conversations"][case["messages"]]

        def render(case: dict = case, messages: list = messages) -> str:
            text = GOLDENS["templates"][template]
            return chat.render(text, messages, bos_token="<s>", eos_token="</s>", **case["arguments"])

        if "text" in case:
            assert render() == case["text"], case
        else:
            with pytest.raises((ValueError, ModelFileError), match=re.escape(case["error"])):
                render()


def test_goldens_see_every_feature() -> None:
    texts = [case.get("text", "") for case in GOLDENS["cases"]]
    for mark in (
        "<tools>",
        "<tool_response>",
        "<think>",
        "[TOOL_CALLS]",
        "[/INST]",
        "日本",
        "<|eot_id|>",
        "1 May 2025",
    ):
        assert any(mark in text for text in texts), mark
    assert any("error" in case for case in GOLDENS["cases"])


def test_the_template_refuses() -> None:
    with pytest.raises(ValueError, match=r"^no system here$"):
        chat.render("{{ raise_exception('no system here') }}", USER)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages",
        "{% for m in messages %}",
        "{{ messages.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages | nofilter }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_bad_templates(template: str) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.chat_template"):
        chat.render(template, USER)


def test_no_template() -> None:
    with pytest.raises(UnsupportedModelError, match="chat_template"):
        chat.render(None, USER)


@pytest.mark.parametrize("messages", ["Hi", {"role": "user"}, ["Hi"], [{"content": "Hi"}], [{"role": 3}], None, 7])
def test_bad_messages(messages: object) -> None:
    with pytest.raises(ValueError, match="messages"):
        chat.render("x", messages)  # type: ignore[arg-type]


def test_tools_are_schemas() -> None:
    def get_weather(town: str) -> str:
        """The weather."""
        return town

    with pytest.raises(TypeError, match="get_weather"):
        chat.render("x", USER, tools=[get_weather])  # type: ignore[list-item]


def test_plain_data_only() -> None:
    message = {"role": "user", "content": [np.int64(3), (1, object()), True]}
    assert chat.render("{{ messages[0].content | tojson }}", [message]) == '[3, [1, "<object>"], true]'
    assert message["content"][2] is True


def test_today() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", chat.render("{{ strftime_now('%Y-%m') }}", USER))
