"""Tools and reasoning with the clients of OpenAI and Anthropic. A script answers in place of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

import ferrum_jax as fj
from ferrum_jax.parsing import Dialect
from support.dialects import CASES
from support.live_server import WEB, Live, live
from support.scripted import Script

USER = [{"role": "user", "content": "Weather?"}]
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}, "required": ["town"]}
WEATHER = {"name": "weather", "description": "The weather of a town.", "parameters": SCHEMA}
CHAT_TOOLS: Any = [{"type": "function", "function": WEATHER}]
GIVEN = [{"town": "Zürich", "days": 2}, {"town": 'a "b"'}]
CALLS = "".join(
    f'\n<tool_call>\n{{"name": "weather", "arguments": {json.dumps(each, ensure_ascii=False)}}}\n</tool_call>' for each in GIVEN
)
TEXT = f"<think>\nHm.\n</think>\n\nLet me see.{CALLS}"


@pytest.fixture(scope="module")
def model() -> fj.Model:
    return fj.load("tiny", dtype="float32", max_seq_len=128)


@pytest.fixture(scope="module")
def engine(model: fj.Model) -> fj.Engine:
    engine = fj.Engine(model, fj.EngineConfig(num_pages=8, max_seqs=4))
    engine.serving = True  # nothing compiles: the script answers
    engine.context = model.max_seq_len = 4096  # and nothing is computed
    return engine


@pytest.fixture(scope="module")
def server(engine: fj.Engine) -> Iterator[Live]:
    with live(engine) as server:
        yield server


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, engine: fj.Engine, model: fj.Model) -> Script:
    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": CASES["qwen3"].template})
    script = Script(monkeypatch, engine)
    script.text = TEXT
    return script


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def test_calls_of_a_chat(client: openai.OpenAI, script: Script) -> None:
    found = client.chat.completions.create(model="tiny", messages=USER, tools=CHAT_TOOLS)
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert choice.message.model_extra["reasoning_content"] == "Hm."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == GIVEN
    assert {call.function.name for call in choice.message.tool_calls} == {"weather"}
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert found.usage.completion_tokens_details.reasoning_tokens > 0
    assert '"name": "weather"' in script.prompts[0]
    # The calls and a result go into the next prompt.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3 degrees"} for call in choice.message.tool_calls]
    client.chat.completions.create(model="tiny", messages=[*USER, choice.message, *results], tools=CHAT_TOOLS)
    assert '<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich", "days": 2}}\n</tool_call>' in script.prompts[1]
    assert script.prompts[1].count("3 degrees") == 2


def test_calls_of_a_chat_stream_add_up(client: openai.OpenAI, script: Script) -> None:
    content, reasoning, calls = "", "", dict[int, list[str]]()
    for chunk in client.chat.completions.create(model="tiny", messages=USER, tools=CHAT_TOOLS, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += (delta.model_extra or {}).get("reasoning_content", "")
        for part in delta.tool_calls or ():
            calls.setdefault(part.index, [part.id or "", part.function.name or "", ""])[2] += part.function.arguments or ""
    assert (content, reasoning, chunk.choices[0].finish_reason) == ("Let me see.", "Hm.", "tool_calls")
    assert [json.loads(written) for _, _, written in calls.values()] == GIVEN and list(calls) == [0, 1]
    with client.chat.completions.stream(model="tiny", messages=USER, tools=CHAT_TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.done") == 2 and kinds.count("tool_calls.function.arguments.delta") > 4
    assert [json.loads(call.function.arguments) for call in final.message.tool_calls] == GIVEN


def test_choices_of_tools(client: openai.OpenAI, script: Script) -> None:
    given = {"model": "tiny", "messages": USER}
    one = client.chat.completions.create(tools=CHAT_TOOLS, parallel_tool_calls=False, **given)
    assert len(one.choices[0].message.tool_calls) == 1
    for more in ({}, {"tools": CHAT_TOOLS, "tool_choice": "none"}):
        plain = client.chat.completions.create(**given, **more).choices[0]
        assert plain.message.content == f"Let me see.{CALLS}" and plain.finish_reason == "stop"
        assert plain.message.tool_calls is None and "weather" not in script.prompts[-1]
    script.text, script.reason = TEXT[: TEXT.index("ürich")], "length"
    cut = client.chat.completions.create(tools=CHAT_TOOLS, **given).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls[0].function.arguments == '{"town": "Z'


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": "f"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]}, "tools.0"),
        ({"tools": CHAT_TOOLS * 2}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": CHAT_TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": CHAT_TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": CHAT_TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, "tools": CHAT_TOOLS}, "tool_choice"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": "f"}]}, "messages.1.tool_calls"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.1.tool_calls.0"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
            "messages.1.tool_calls.0",
        ),
    ],
)
def test_mistakes_are_named(server: Live, script: Script, body: dict[str, Any], field: str) -> None:
    reply = WEB.post(f"{server.url}/v1/chat/completions", json={"messages": USER} | body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text


def test_a_template_without_calls_is_named(server: Live) -> None:
    for path, more in (("chat/completions", {"messages": USER, "tools": CHAT_TOOLS}), ("messages", {"messages": USER})):
        tools = {"tools": [{"name": "f"}], "max_tokens": 2} if path == "messages" else {}
        reply = WEB.post(f"{server.url}/v1/{path}", json=more | tools)
        assert reply.status_code == 400 and "--tool-parser" in reply.json()["error"]["message"]


def test_switches_of_thinking(client: openai.OpenAI, claude: anthropic.Anthropic, script: Script) -> None:
    script.text, given = "Hi", {"model": "tiny", "messages": USER}
    client.chat.completions.create(reasoning_effort="none", **given)
    client.responses.create(model="tiny", input="Hi", reasoning={"effort": "none"})
    claude.messages.create(max_tokens=9, thinking={"type": "disabled"}, **given)
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in script.prompts)
    client.chat.completions.create(reasoning_effort="high", **given)
    claude.messages.create(max_tokens=9, thinking={"type": "enabled", "budget_tokens": 1024}, **given)
    assert all(prompt.endswith("assistant\n") for prompt in script.prompts[3:])


def test_items_of_a_response(client: openai.OpenAI, script: Script) -> None:
    tools: Any = [{"type": "function", **WEATHER}]
    found = client.responses.create(model="tiny", input="Weather?", tools=tools)
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call", "function_call"]
    assert found.output[0].content[0].text == "Hm." and found.output_text == "Let me see."
    assert [json.loads(item.arguments) for item in found.output[2:]] == GIVEN and found.status == "completed"
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(model="tiny", input="Weather?", tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output[0].content == found.output[0].content and final.output_text == found.output_text
    assert [json.loads(item.arguments) for item in final.output[2:]] == GIVEN
    assert kinds.count("response.function_call_arguments.done") == 2
    assert kinds.count("response.reasoning_text.delta") > 0 and kinds.count("response.output_item.done") == 4
    # The answer goes on from what is kept, and from items that the client sends itself.
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "3 degrees"} for item in found.output[2:]
    ]
    client.responses.create(model="tiny", previous_response_id=found.id, input=outputs, tools=tools)
    items: Any = [{"role": "user", "content": "Weather?"}, *[item.to_dict() for item in found.output], *outputs]
    client.responses.create(model="tiny", input=items, tools=tools)
    assert script.prompts[-1] == script.prompts[-2] and script.prompts[-1].count("3 degrees") == 2
    assert "Let me see.\n<tool_call>" in script.prompts[-1]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"type": "function_call", "call_id": "a", "name": "f"}, "input.0.arguments"),
        ({"type": "function_call_output", "output": "a"}, "input.0.call_id"),
        ({"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}, "input.0.output.0"),
        ({"type": "function_call_output", "call_id": "a"}, "input.0.output"),
        ({"type": "reasoning", "content": "a"}, "input.0"),
        ({"type": "item_reference", "id": "a"}, "input.0"),
    ],
)
def test_mistakes_in_items_are_named(server: Live, script: Script, item: dict[str, Any], field: str) -> None:
    reply = WEB.post(f"{server.url}/v1/responses", json={"input": [item]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text


CLAUDE_TOOLS: Any = [{"name": "weather", "description": "The weather of a town.", "input_schema": SCHEMA}]


def test_blocks_of_a_message(claude: anthropic.Anthropic, script: Script) -> None:
    given: Any = {"model": "tiny", "max_tokens": 100, "tools": CLAUDE_TOOLS}
    found = claude.messages.create(messages=USER, **given)
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert found.content[0].thinking == "Hm." and found.content[1].text == "Let me see."
    assert [block.input for block in found.content[2:]] == GIVEN and found.stop_reason == "tool_use"
    with claude.messages.stream(messages=USER, **given) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.input for block in final.content[2:]] == GIVEN and final.stop_reason == "tool_use"
    assert kinds.count("input_json") > 4 and kinds.count("thinking") > 0 and kinds.count("content_block_stop") == 4
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "3 degrees"} for block in found.content[2:]]
    talk: Any = [*USER, {"role": "assistant", "content": found.content}, {"role": "user", "content": results}]
    claude.messages.create(messages=talk, **given)
    assert script.prompts[-1].count("3 degrees") == 2 and "Let me see.\n<tool_call>" in script.prompts[-1]
    counted = claude.messages.count_tokens(model="tiny", messages=talk, tools=CLAUDE_TOOLS).input_tokens
    assert counted > claude.messages.count_tokens(model="tiny", messages=USER).input_tokens + 50
    chosen = {"type": "auto", "disable_parallel_tool_use": True}
    one = claude.messages.create(messages=USER, tool_choice=chosen, **given)
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
    plain = claude.messages.create(messages=USER, tool_choice={"type": "none"}, **given)
    assert plain.content[1].text == f"Let me see.{CALLS}" and plain.stop_reason == "end_turn"
    script.text, script.reason = TEXT[: TEXT.index("ürich")], "length"
    assert claude.messages.create(messages=USER, **given).content[2].input == {"town": "Z"}
    with claude.messages.stream(messages=USER, **given) as stream:
        assert stream.get_final_message().content[2].name == "weather"  # the client drops a text that is not complete


@pytest.mark.parametrize("name", CASES)
def test_every_format_comes_through(monkeypatch, model, client: openai.OpenAI, script: Script, name: str) -> None:
    """With the control tokens that it needs."""
    template = CASES[name].template
    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": template})
    script.text = {
        "qwen_xml": "<tool_call>\n<function=weather>\n<parameter=town>\n7\n</parameter>\n</function>\n</tool_call>",
        "glm": "<tool_call>weather\n<arg_key>town</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
        "llama": '{"name": "weather", "parameters": {"town": "7"}}',
        "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "7"}}]',
        "mistral_named": '[TOOL_CALLS]weather[ARGS]{"town": "7"}',
        "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"town": "7"}<｜tool▁call▁end｜>',
        "deepseek_old": '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"town": "7"}\n```<｜tool▁call▁end｜>',
        "kimi": '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"town": "7"}<|tool_call_end|>',
        "lfm": '<|tool_call_start|>[weather(town="7")]<|tool_call_end|>',
        "gemma": '<|tool_call>call:weather{town:<|"|>7<|"|>}<tool_call|>',
        "harmony": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"town": "7"}',
    }.get(name, '<tool_call>{"name": "weather", "arguments": {"town": "7"}}</tool_call>')
    message = client.chat.completions.create(model="tiny", messages=USER, tools=CHAT_TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"town": "7"})
    assert message.content is None and Dialect.of(template).calls == CASES[name].calls
    if name.startswith("mistral"):
        assert len(call.id) == 9
