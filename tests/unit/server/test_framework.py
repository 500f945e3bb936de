"""A framework for agents, Pydantic AI, on top of OpenAI's client: a structured answer, as a format and as a forced call,
and a call whose result is sent back. The model of the tests knows nothing; its grammars make it answer."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest

import ferrum_jax as fj
from support.live_server import Live
from unit.server.test_forced_calls import TEMPLATE

ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim, of the extra `test`, is not installed")


class Forecast(pydantic.BaseModel):
    kind: Literal["sun", "rain"]
    days: int = pydantic.Field(ge=1, le=9)


@pytest.fixture
def small(server: Live, model: fj.Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": TEMPLATE})
    settings = ai.ModelSettings(max_tokens=200, temperature=0.7, seed=3, parallel_tool_calls=False)
    return OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="any"), settings=settings)


@pytest.mark.parametrize("how", ["NativeOutput", "ToolOutput"])
def test_a_structured_answer(small: Any, how: str) -> None:
    """As a format of the answer, and as a call that is forced."""
    found = ai.Agent(small, output_type=getattr(ai, how)(Forecast)).run_sync("Weather?")
    assert isinstance(found.output, Forecast) and found.usage.requests == 1 and found.usage.output_tokens > 0


def test_a_call_and_its_result(small: Any) -> None:
    tool = ai.ToolDefinition(name="weather", parameters_json_schema=Forecast.model_json_schema())
    agent = ai.Agent(small, output_type=[str, ai.DeferredToolRequests], toolsets=[ai.ExternalToolset([tool])])
    asked = agent.run_sync("Weather?", model_settings={"extra_body": {"tool_choice": "required"}})
    (call,) = asked.output.calls
    assert call.tool_name == "weather" and Forecast.model_validate(call.args_as_dict())
    results = ai.DeferredToolResults(calls={call.tool_call_id: "3 degrees"})
    bias = {"extra_body": {"tool_choice": "none"}, "max_tokens": 5}
    answer = agent.run_sync(message_history=asked.all_messages(), deferred_tool_results=results, model_settings=bias)
    assert isinstance(answer.output, str) and answer.output
