"""Chat rendering against transformers' (goldens made by tests/goldens/scripts/make_chat_goldens.py), and its errors."""

import gzip
import json
import re

import numpy as np
import pytest

import support
from ferrum_jax import chat
from ferrum_jax.errors import ChatTemplateError, ModelFileError, UnsupportedModelError

GOLDENS = json.loads(gzip.decompress((support.GOLDENS / "chat" / "goldens.json.gz").read_bytes()))
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
            with pytest.raises(ChatTemplateError, match=re.escape(case["error"])):
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
    with pytest.raises(ChatTemplateError, match=r"^no system here$"):
        chat.render("{{ raise_exception('no system here') }}", USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_templates_that_fail_on_the_messages(template: str) -> None:
    """That is not the file's fault: for other messages the template may be right."""
    with pytest.raises(ChatTemplateError, match=r"tokenizer\.chat_template: ") as caught:
        chat.render(template, USER)
    assert isinstance(caught.value, ValueError) and not isinstance(caught.value, ModelFileError)


@pytest.mark.parametrize(
    "template",
    [
        *("{% if %}", "{{ messages", "{% for m in messages %}", "{{ messages | nofilter }}", "{% break %}"),
        *("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ 1" + "+1" * 5000 + " }}", "{{ " + "9" * 5000 + " }}"),
        *("{% for x in y %}" * 25 + "{% endfor %}" * 25, "{% if 1 %}" * 500 + "{% endif %}" * 500, "x" * 2**20),
        *("{{ f(a=1, a=2) }}", "{% set none = 1 %}", "{% trans %}x{% endtrans %}"),
    ],
    ids=lambda template: template[:20],
)
def test_templates_that_cannot_be_compiled(template: str) -> None:
    with pytest.raises(ModelFileError, match=r"^tokenizer\.chat_template: "):
        chat.render(template, USER)
    with pytest.raises(ModelFileError, match=r"^m\.gguf: key tokenizer\.chat_template\.tool_use: "):
        chat.check_template(template, "m.gguf", "tool_use")


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
    message = {"role": "tool", "content": [np.int64(3), (1, object()), True]}
    assert chat.render("{{ messages[0].content | tojson }}", [message]) == '[3, [1, "<object>"], true]'
    assert message["content"][2] is True


def test_today() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", chat.render("{{ strftime_now('%Y-%m') }}", USER))
