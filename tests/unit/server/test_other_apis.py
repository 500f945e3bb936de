"""Anthropic's API and OpenAI's Responses with their clients; embeddings and metrics."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ferrum_jax as fj
from support.goldens import tiny_encoders
from support.live_server import WEB, Live, live

STORY = "Once upon a time there was"
MESSAGES = [{"role": "user", "content": STORY}]


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def greedy(engine: fj.Engine, prompt: str, tokens: int = 12) -> fj.Completion:
    return engine.submit(prompt, fj.SamplingParams(max_tokens=tokens, temperature=0.0)).result()


def test_a_message_is_the_engine_s(client, engine):
    expected = greedy(engine, f"Be kind.\n{STORY}\n\nthe sea")
    given = {"model": "tiny", "max_tokens": 12, "system": [{"type": "text", "text": "Be kind."}]}
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]}]
    found = client.messages.create(messages=MESSAGES + parts, extra_body={"temperature": 0}, **given)
    assert (found.content[0].text, found.stop_reason, found.role) == (expected.text, "max_tokens", "assistant")
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    assert found.usage.output_tokens == 12 and found.usage.cache_read_input_tokens > 0
    counted = client.messages.count_tokens(model="tiny", messages=MESSAGES + parts, system="Be kind.")
    assert counted.input_tokens == len(expected.prompt_token_ids)


def test_a_stream_of_messages_adds_up(client, engine):
    with client.messages.stream(model="tiny", max_tokens=12, messages=MESSAGES, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == greedy(engine, STORY).text
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 12


def test_a_stop_sequence_is_named(client, engine):
    text = greedy(engine, STORY).text
    stop = text[10:14]
    found = client.messages.create(
        model="tiny", max_tokens=12, messages=MESSAGES, stop_sequences=["never", stop], extra_body={"temperature": 0}
    )
    assert (found.content[0].text, found.stop_reason, found.stop_sequence) == (text[: text.index(stop)], "stop_sequence", stop)


def test_an_answer_goes_on(client, openai_client, engine):
    talk = [*MESSAGES, {"role": "assistant", "content": "a smith who "}]
    expected = greedy(engine, f"{STORY}\na smith who").text
    found = client.messages.create(model="tiny", max_tokens=12, messages=talk, extra_body={"temperature": 0})
    assert found.content[0].text == expected
    chat = openai_client.chat.completions.create(
        model="tiny", max_tokens=12, messages=talk, temperature=0, extra_body={"continue_final_message": True}
    )
    assert chat.choices[0].message.content == expected


def test_mistakes_in_anthropic_s_form(client, server):
    for given, message in [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0: 'image'"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: .* a switch"),
    ]:
        with pytest.raises(anthropic.BadRequestError, match=message):
            client.messages.create(model="tiny", max_tokens=2, **given)
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="large", max_tokens=2, messages=MESSAGES)
    body = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error") and body["request_id"]
    assert (
        WEB.post(f"{server.url}/v1/messages", json={"messages": MESSAGES}).json()["error"]["message"].startswith("max_tokens")
    )


def test_a_response_is_the_engine_s(openai_client, engine):
    found = openai_client.responses.create(
        model="tiny", input=STORY, max_output_tokens=12, temperature=0, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert found.output_text == greedy(engine, STORY).text and found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens" and found.usage.output_tokens == 12
    assert [len(entry.top_logprobs) for entry in found.output[0].content[0].logprobs] == [2] * 12
    kinds, text, last = [], "", None
    stream = openai_client.responses.create(model="tiny", input=STORY, max_output_tokens=12, temperature=0, stream=True)
    for last in stream:
        kinds.append(last.type)
        text += last.delta if last.type == "response.output_text.delta" else ""
    assert text == found.output_text == last.response.output_text and last.sequence_number == len(kinds) - 1
    assert kinds[:4] == [f"response.{kind}" for kind in ("created", "in_progress", "output_item.added", "content_part.added")]
    tail = ("output_text.done", "content_part.done", "output_item.done", "incomplete")
    assert kinds[-4:] == [f"response.{kind}" for kind in tail]


def test_a_response_goes_on_from_one_that_is_kept(openai_client, engine):
    first = openai_client.responses.create(model="tiny", input=STORY, max_output_tokens=12, temperature=0, instructions="Hi.")
    second = openai_client.responses.create(
        model="tiny", previous_response_id=first.id, max_output_tokens=8, temperature=0,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Then"}]}],
    )  # fmt: skip
    assert second.output_text == greedy(engine, f"{STORY}\n{first.output_text}\nThen", 8).text
    assert openai_client.responses.retrieve(first.id).output_text == first.output_text
    openai_client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.responses.create(model="tiny", input="a", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"
    unkept = openai_client.responses.create(model="tiny", input="a", max_output_tokens=2, store=False)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(unkept.id)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"input": [{"type": "function_call_output"}]}, "input.0.output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [None]}]}, "input.0.content.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_mistakes_of_responses(server, body, field):
    reply = WEB.post(f"{server.url}/v1/responses", json={"input": "a"} | body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_embeddings(engine, tmp_path):
    spec = next(case for case in tiny_encoders.CASES if "mean" in case.name)
    tiny_encoders.write_directory(spec, tmp_path / "model")
    model = fj.load(tmp_path / "model")
    texts = ["iron", "copper and gold"]
    expected = model.embed(texts)
    with live(engine, embedding_name="tiny-bert") as bare:
        assert WEB.post(f"{bare.url}/v1/embeddings", json={"input": "a"}).status_code == 404
    with (
        live(engine, embedder=model, embedding_name="tiny-bert") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        found = client.embeddings.create(model="tiny-bert", input=texts)  # base64
        assert np.array_equal(np.array([each.embedding for each in found.data], np.float32), expected)
        plain = client.embeddings.create(model="tiny-bert", input="iron", encoding_format="float")
        assert np.allclose(plain.data[0].embedding, expected[0], atol=1e-6)
        assert found.usage.prompt_tokens == sum(map(len, model.tokenizer.encode_batch(texts)))
        assert [each.id for each in client.models.list()] == ["tiny", "tiny-bert"]
        for body, field in [
            ({"input": "a", "dimensions": 7}, "dimensions"), ({"input": []}, "input"), ({"input": "a " * 9000}, "input"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format"), ({"input": [1, 2]}, "input"),
        ]:  # fmt: skip
            reply = WEB.post(f"{server.url}/v1/embeddings", json=body)
            assert reply.status_code == 400 and reply.json()["error"]["param"].startswith(field), body


def test_metrics_add_up(engine):
    with live(engine) as server:
        before = engine.metrics()
        for tokens in (3, 5):
            body = {"prompt": STORY, "max_tokens": tokens, "ignore_eos": True}
            WEB.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        text = WEB.get(f"{server.url}/metrics").text
    found = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if "le" not in s.labels}
    assert found["ferrum_generation_tokens_total"] == found["ferrum_request_generation_tokens_sum"] == 8
    assert found["ferrum_request_success_total"] == found["ferrum_time_to_first_token_seconds_count"] == 2
    assert 0 < found["ferrum_inter_token_latency_seconds_count"] <= 6  # a dispatch has up to two tokens
    assert found["ferrum_request_time_per_output_token_seconds_count"] == 2
    assert found["ferrum_num_requests_running"] == found["ferrum_kv_cache_usage_perc"] == 0
    after = engine.metrics()
    computed = after["prompt_tokens"] - before["prompt_tokens"]
    cached = after["prefix_saved_tokens"] - before["prefix_saved_tokens"]
    assert found["ferrum_prompt_tokens_total"] == computed + cached
    assert found["ferrum_prefix_cache_queries_total"] == after["prompt_tokens"] + after["prefix_saved_tokens"]
    assert found["ferrum_prefix_cache_hits_total"] == after["prefix_saved_tokens"]
