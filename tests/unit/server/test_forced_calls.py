"""Calls that a request forces: the model of the tests knows nothing, and its grammar makes it call."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

import ferrum_jax as fj
from ferrum_jax.parsing import told
from ferrum_jax.server.calling import openai_calling
from ferrum_jax.server.conversation import Turn
from support.live_server import Live

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% for t in tools or [] %}<tool_call> {{ t.function.name }}\n{% endfor %}"
)
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["kind", "days"],
    "properties": {"kind": {"enum": ["sun", "rain"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}  # fmt: skip
FUNCTIONS: list[dict[str, Any]] = [{"name": "weather", "parameters": SCHEMA}, {"name": "stop", "parameters": SCHEMA}]
TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
GIVEN: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": "Weather?"}]}


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch, model: fj.Model) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": TEMPLATE})


def check(arguments: str) -> None:
    given = json.loads(arguments)
    assert given["kind"] in ("sun", "rain") and given["days"] in range(1, 10) and len(given) == 2


def test_forced_calls(server: Live) -> None:
    stop = {"type": "function", "function": {"name": "stop"}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        found = client.chat.completions.create(
            tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1.3, seed=1, **GIVEN
        ).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.content is None
        (call,) = found.message.tool_calls
        assert call.function.name in ("weather", "stop")
        check(call.function.arguments)
        with client.chat.completions.stream(tools=TOOLS, tool_choice=stop, seed=2, **GIVEN) as stream:
            (call,) = stream.get_final_completion().choices[0].message.tool_calls
        assert call.function.name == "stop"
        check(call.function.arguments)
        strict = [tool | {"function": tool["function"] | {"parameters": {"not": {}}}} for tool in TOOLS]
        with pytest.raises(openai.BadRequestError, match="not"):
            client.chat.completions.create(tools=strict, tool_choice="required", **GIVEN)
    tools: Any = [{"name": function["name"], "input_schema": SCHEMA} for function in FUNCTIONS]
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as claude:
        message = claude.messages.create(
            tools=tools, tool_choice={"type": "tool", "name": "weather"}, extra_body={"temperature": 0.0}, **GIVEN
        )
        assert [block.type for block in message.content] == ["tool_use"] and message.stop_reason == "tool_use"
        check(json.dumps(message.content[0].input))


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


@pytest.mark.parametrize("template", [PLAIN, WITHOUT_SYSTEM], ids=["system", "without system"])
def test_a_template_without_functions(server: Live, model: fj.Model, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """A message says what there is, calls and results are texts, and a call can be forced."""
    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": template})
    monkeypatch.setattr(model, "max_seq_len", 2048)
    service = server.service
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}
    messages = [
        *GIVEN["messages"], {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "It rains."}]},
        {"role": "tool", "tool_call_id": "1", "content": "Still."}, {"role": "user", "content": "So?"},
    ]  # fmt: skip
    turn = Turn(service, messages, {}, openai_calling(TOOLS, "required", False))
    monkeypatch.setattr(model, "encode_rendered", lambda text: [1])
    turn.encode()
    begin, _, rest = turn.prompt.partition("You can call functions.")
    assert begin == ("system: " if template == PLAIN else "user: ") and json.dumps(FUNCTIONS[0]) in rest
    written = '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>\n'
    results = "".join(f"<tool_response>\n{text}\n</tool_response>\n" for text in ("It rains.", "Still."))
    assert rest.endswith(f"Weather?\nassistant: {written * 2}user: {results}So?\n")
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.tokenizer, "chat_templates", {"default": template})
        patch.setattr(told, "instructions", lambda tools: "Call!")  # the context of the tests is short
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            found = client.chat.completions.create(
                tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=4, **GIVEN
            ).choices[0]
        check(found.message.tool_calls[0].function.arguments)


def test_a_format_goes_on_from_tokens_of_the_answer(server: Live, model: fj.Model) -> None:
    begun = model.tokenizer.encode('{"kind"', add_special=False)
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        found = client.chat.completions.create(seed=1, extra_body={"answer_token_ids": begun}, **GIVEN, **asked).choices[0]
        assert found.message.content.startswith('{"kind"') and found.finish_reason == "stop"
        check(found.message.content)
        wrong = model.tokenizer.encode("kind", add_special=False)
        with pytest.raises(openai.BadRequestError, match="the grammar cannot go on"):
            client.chat.completions.create(extra_body={"answer_token_ids": wrong}, **GIVEN, **asked)
