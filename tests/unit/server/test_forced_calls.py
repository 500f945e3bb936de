"""Calls that a request forces: the model of the tests knows nothing, and its grammar makes it call."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

import ferrum_jax as fj
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
