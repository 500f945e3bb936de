"""OpenAI's routes with OpenAI's client: what comes through HTTP is what the engine gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import openai
import pytest

import ferrum_jax as fj
from support.live_server import WEB, Live

STORY = "Once upon a time there was"
MESSAGES = [{"role": "user", "content": STORY}]
GREEDY = fj.SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(engine: fj.Engine) -> fj.Completion:
    return engine.submit(STORY, fj.SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=3)).result()


def test_a_completion_is_the_engine_s(client, greedy):
    found = client.completions.create(model="tiny", prompt=STORY, max_tokens=12, temperature=0)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (greedy.text, "length")
    assert found.usage.prompt_tokens == len(greedy.prompt_token_ids)
    assert found.usage.completion_tokens == 12 and found.usage.total_tokens == 12 + found.usage.prompt_tokens
    assert found.object == "text_completion" and found.model == "tiny" and found.id.startswith("cmpl-")
    assert found.model_extra["timings"]["predicted_n"] == 12


def test_a_chat_is_the_engine_s(client, greedy):
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0)
    message = found.choices[0].message
    assert (message.content, message.role, found.choices[0].finish_reason) == (greedy.text, "assistant", "length")
    again = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == (len(greedy.prompt_token_ids) - 1) // 8 * 8


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_adds_up(client, greedy, chat):
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        chunks = list(client.chat.completions.create(messages=MESSAGES, **given))
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    else:
        chunks = list(client.completions.create(prompt=STORY, **given))
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == greedy.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert {chunk.usage for chunk in chunks[:-1]} == {None} and len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities(client, engine, greedy):
    """Of a chat, of a completion, and of the prompt with echo."""
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    content = found.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [pytest.approx(row[0][1]) for row in greedy.logprobs]
    assert [[best.logprob for best in entry.top_logprobs] for entry in content] == [
        [pytest.approx(value) for _, value in row[1:3]] for row in greedy.logprobs
    ]
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == greedy.text
    text = client.completions.create(model="tiny", prompt=STORY, max_tokens=12, temperature=0, logprobs=3, echo=True)
    marks = text.choices[0].logprobs
    assert text.choices[0].text == STORY + greedy.text and marks.token_logprobs[0] is None
    expected = [row[0][1] for row in [*greedy.prompt_logprobs[1:], *greedy.logprobs]]
    assert marks.token_logprobs[1:] == [pytest.approx(value) for value in expected]
    pairs = [pair for pair in zip(marks.text_offset, marks.tokens, strict=True) if not pair[1].startswith("<")]
    assert len(pairs) > 12 and all(text.choices[0].text[at:].startswith(token) for at, token in pairs)
    only = client.completions.create(model="tiny", prompt=STORY, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert only.text == STORY and only.logprobs.token_logprobs == marks.token_logprobs[: len(only.logprobs.tokens)]


def test_every_parameter_arrives(client, engine):
    own = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 4, "bad_words": ["cat"], "ignore_eos": True}
    theirs = {"temperature": 1.2, "top_p": 0.9, "seed": 3, "presence_penalty": 0.3, "frequency_penalty": 0.2, "max_tokens": 12}
    biased = {5: -4.0}
    params = fj.SamplingParams(**own, **theirs, n=3, logit_bias=biased)
    expected = [completion.text for completion in engine.submit(STORY, params).results()]
    given = {"logit_bias": {"5": -4.0}, "extra_body": own, **theirs, "n": 3, "model": "tiny"}
    assert [choice.text for choice in client.completions.create(prompt=STORY, **given).choices] == expected
    assert [c.message.content for c in client.chat.completions.create(messages=MESSAGES, **given).choices] == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **given):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_a_stop_string_ends_a_text(client, greedy):
    stop = greedy.text[10:14]
    found = client.completions.create(model="tiny", prompt=STORY, max_tokens=12, temperature=0, stop=[stop, "never"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (greedy.text[: greedy.text.index(stop)], "stop")


def test_several_prompts_of_each_kind(client, model, greedy):
    ids = [model.tokenizer.encode(text) for text in (STORY, "The cat")]
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    texts = client.completions.create(prompt=[STORY, "The cat"], n=2, **given)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text == greedy.text != texts.choices[2].text
    assert texts.usage.prompt_tokens == sum(map(len, ids)) and texts.usage.completion_tokens == 48
    tokens = client.completions.create(prompt=ids, **given)
    assert [choice.text for choice in tokens.choices] == [choice.text for choice in texts.choices[::2]]
    assert client.completions.create(prompt=ids[0], **given).choices[0].text == greedy.text


def test_many_streams_at_once(server, engine):
    """More than run together; the async client."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=STORY, max_tokens=8 + number, seed=number, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(10)))

    params = [fj.SamplingParams(max_tokens=8 + number, seed=number, ignore_eos=True) for number in range(10)]
    assert asyncio.run(ask_all()) == [engine.submit(STORY, each).result().text for each in params]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError, match="'large' does not exist here; there is tiny"):
        client.models.retrieve("large")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="large", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def schema_of(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "made", "schema": schema, "strict": True}}


BAD = [
    ({"top_p": 2}, "top_p"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 1000}, "n"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ""}, "stop"),
    ({"prompt": 5}, "prompt"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logprobs": 65}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt.0.1"),
    ({"prompt": STORY * 100}, "prompt"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"suffix": "end"}, "suffix"),
    ({"guided_json": {"not": {}}}, "guided_json"),
    ({"guided_regex": "(?=a)"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: name"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]}, "guided_choice"),
]
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools.0"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": schema_of({"type": "string", "pattern": "a(?!b)"})}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format.type"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 65}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [("completions", {"prompt": STORY} | body, field) for body, field in BAD]
    + [("chat/completions", {"messages": MESSAGES} | body, field) for body, field in BAD_CHATS],
)
def test_a_mistake_is_named(server, path, body, field):
    reply = WEB.post(f"{server.url}/v1/{path}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error"), error
    assert field.split(".")[0] in error["message"] or field in ("prompt", "messages")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 5000, b'{"prompt": NaN}']
)
def test_what_is_not_json_is_refused(server, raw):
    assert WEB.post(f"{server.url}/v1/completions", content=raw).status_code == 400


def test_a_full_context_has_a_code(server):
    reply = WEB.post(f"{server.url}/v1/completions", json={"prompt": STORY * 100})
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_fields_are_ignored_and_named(server):
    body = {"messages": MESSAGES, "max_tokens": 1, "user": "me", "größe": 1, "chat_template_kwargs": {"enable_thinking": False}}
    reply = WEB.post(f"{server.url}/v1/chat/completions", json=body | {"tools": [], "tool_choice": "none"})
    assert reply.status_code == 200
    assert reply.headers["x-ferrum-ignored"] == "user, gr\\xf6\\xdfe, chat_template_kwargs.enable_thinking"
    plain = WEB.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1})
    assert "x-ferrum-ignored" not in plain.headers


def test_tokens_and_templates(server, model):
    def ask(path: str, **body):
        return WEB.post(f"{server.url}/{path}", json=body).raise_for_status().json()

    ids = model.tokenizer.encode(STORY)
    assert ask("tokenize", prompt=STORY) == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert ask("tokenize", content=STORY)["tokens"] == model.tokenizer.encode(STORY, add_special=False)
    assert ask("tokenize", messages=MESSAGES)["tokens"] == ids
    pieces = ask("tokenize", content=STORY, with_pieces=True)["tokens"]
    assert "".join(each["piece"] for each in pieces) == STORY
    assert ask("detokenize", tokens=model.tokenizer.encode(STORY, add_special=False))["content"] == STORY
    talk = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "a smith."}]}]
    assert ask("apply-template", messages=talk)["prompt"] == f"{STORY}\na smith."
    assert WEB.get(f"{server.url}/props").json()["total_slots"] == 4


def test_a_developer_is_a_system(server):
    messages = [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}]
    assert WEB.post(f"{server.url}/apply-template", json={"messages": messages}).json()["prompt"] == "a\nb"


def test_tokens_that_arrive_together_are_sent_together(server, engine):
    """Two steps a dispatch: fewer events than tokens."""
    body = {"prompt": STORY, "max_tokens": 40, "stream": True, "ignore_eos": True}
    with WEB.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: {")]
    assert len(lines) < 35 and all(len(a) and len(b) for a, b in pairwise(lines))
