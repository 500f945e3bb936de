"""Structured output over HTTP, as the clients ask for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal

import anthropic
import openai
import pydantic
import pytest

from support.live_server import WEB, Live, idle, until
from unit.server.test_openai import schema_of

MESSAGES = [{"role": "user", "content": "Once upon a time there was"}]


class Pet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    legs: int = pydantic.Field(ge=0, le=4)
    tame: bool | None


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def dense(model) -> dict[str, float]:
    """A bias against white space, of which the tiny model writes much."""
    pieces = {token: model.tokenizer.token_bytes(token) for token in range(model.tokenizer.vocab_size)}
    return {str(token): -30.0 for token, piece in pieces.items() if piece and not piece.strip()}


def test_a_class_comes_back(client, dense):
    for seed in range(3):
        asked = {
            "model": "tiny",
            "messages": MESSAGES,
            "temperature": 1.5,
            "seed": seed,
            "max_tokens": 80,
            "n": 2,
            "logit_bias": dense,
        }
        found = client.chat.completions.parse(response_format=Pet, **asked)
        assert all(isinstance(choice.message.parsed, Pet) and choice.finish_reason == "stop" for choice in found.choices)
    response = client.responses.parse(
        model="tiny", input="A pet:", text_format=Pet, max_output_tokens=80, extra_body={"logit_bias": dense}
    )
    assert isinstance(response.output_parsed, Pet) and response.text.format.name == "Pet"


def test_a_stream_adds_up_to_a_value(client, dense):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 80, "logit_bias": dense}
    with client.chat.completions.stream(response_format=Pet, **asked) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Pet)


def test_every_field_is_taken(server):
    digits, choices = r"[0-9]{2,4}", ["red", "green"]
    for path, given, right in [
        ("chat/completions", {"response_format": schema_of({"enum": choices})}, '"(red|green)"'),
        ("completions", {"response_format": schema_of({"enum": choices})}, '"(red|green)"'),
        ("completions", {"structured_outputs": {"json": {"const": 5}}}, "5"),
        ("completions", {"structured_outputs": {"json": '{"const": 5}'}}, "5"),
        ("completions", {"structured_outputs": {"regex": digits}}, digits),
        ("completions", {"structured_outputs": {"choice": choices}}, "red|green"),
        ("completions", {"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}}, "a[0-9]"),
        ("completions", {"structured_outputs": {"grammar": "start: /a[0-9]/"}}, "a[0-9]"),
        ("completions", {"guided_json": {"const": 5}}, "5"),
        ("completions", {"guided_regex": digits, "response_format": {"type": "text"}}, digits),
        ("completions", {"guided_choice": choices}, "red|green"),
        ("completions", {"guided_grammar": 'root ::= "a" [0-9]'}, "a[0-9]"),
    ]:
        prompt = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": ["Once", "upon"]}
        reply = WEB.post(f"{server.url}/v1/{path}", json={"max_tokens": 20, "temperature": 1.5} | prompt | given).json()
        assert "x-ferrum-ignored" not in reply
        for choice in reply["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert re.fullmatch(right, text) and choice["finish_reason"] == "stop", (given, text)


def test_any_object(client, engine):
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=100, logit_bias={"0": 20}
    ).choices[0]
    assert found.message.content.startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)
    until(lambda: idle(engine))


def test_anthropic_s_format(server, dense):
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        asked = {"type": "json_schema", "schema": Pet.model_json_schema()}
        given = {"model": "tiny", "max_tokens": 80, "messages": MESSAGES, "extra_body": {"logit_bias": dense}}
        found = client.messages.create(output_config={"format": asked}, **given)
        assert Pet.model_validate_json(found.content[0].text)
        with pytest.raises(anthropic.BadRequestError, match=r"output_config.format.schema: /not is not supported"):
            bad = {"type": "json_schema", "schema": {"not": {}}}
            client.messages.create(output_config={"format": bad}, **given)


def test_a_mistake_names_field_keyword_and_place(server):
    body = {"messages": MESSAGES, "response_format": schema_of({"items": {"type": "string", "if": {}}})}
    error = WEB.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
    assert error["message"] == "response_format.json_schema.schema: /items/if is not supported"
    assert error["param"] == "response_format.json_schema.schema"
