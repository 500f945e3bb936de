"""What the chat page needs of the server: its files, token ids in answers, answers that go on from tokens, and routing."""

from __future__ import annotations

import hashlib
import re
import subprocess

import numpy as np
import openai
import pytest

import ferrum_jax as fj
from ferrum_jax.server import page
from support import ROOT
from support.live_server import WEB, Live, live

MESSAGES = [{"role": "user", "content": "Once upon a time there was"}]
WEB_FOLDER = "ferrum_jax/server/web"
GREEDY = fj.SamplingParams(max_tokens=12, temperature=0.0)


def complete(server: Live, path: str = "chat/completions", **fields):
    asked = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": MESSAGES[0]["content"]}
    return WEB.post(f"{server.url}/v1/{path}", json=asked | {"max_tokens": 12, "temperature": 0} | fields)


def ids_of(choices):
    return [id for choice in choices for id in choice.model_extra.get("token_ids", [])]


def test_the_page_is_served_and_kept_by_browsers(server: Live):
    found = WEB.get(server.url)
    assert found.status_code == 200 and found.headers["content-type"] == "text/html; charset=utf-8"
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    again = WEB.get(server.url, headers={"if-none-match": found.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", found.headers["etag"])
    for path, kind in {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}.items():
        file = WEB.get(f"{server.url}/web/{path}")
        assert file.headers["content-type"].startswith(kind) and file.headers["etag"] != found.headers["etag"]
    for path in ("nothing.js", "../page.py", "%2e%2e/page.py", "vendor"):
        assert WEB.get(f"{server.url}/web/{path}").status_code == 404


def test_every_file_of_the_page_is_named_by_another(server: Live):
    """index.html names the first ones; none names an address elsewhere, so the page works without a network."""
    texts = {path.relative_to(page.FOLDER).as_posix(): path.read_text("utf-8") for path in page.FOLDER.rglob("*.*")}
    own = {name: text for name, text in texts.items() if not name.startswith("vendor/")}
    named = set(re.findall(r'(?:from "\./|web/)([\w./]+)"', "".join(own.values())))
    assert named | {"index.html"} == {name for name in texts if not name.endswith(".txt")}
    addresses = set(re.findall(r"https?://[^\s\"']+", "".join(own.values())))
    assert addresses == {"http://www.w3.org/2000/svg"}


def test_the_page_needs_no_key_and_can_be_left_out(engine):
    with live(engine, api_keys=("first",)) as server:
        assert WEB.get(server.url).status_code == WEB.get(f"{server.url}/web/app.js").status_code == 200
        assert WEB.get(f"{server.url}/props").status_code == 401
    with live(engine, web=False) as server:
        assert WEB.get(server.url).status_code == WEB.get(f"{server.url}/web/app.js").status_code == 404
        assert WEB.get(f"{server.url}/health").status_code == 200


def test_the_package_has_every_file_of_the_page():
    """In CI the package is the wheel."""
    listed = subprocess.run(["git", "ls-files", WEB_FOLDER], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    for path in listed:
        assert (page.FOLDER / path.removeprefix(f"{WEB_FOLDER}/")).read_bytes() == (ROOT / path).read_bytes()


def test_libraries_of_the_page_are_those_of_the_documentation():
    table = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| `([0-9a-f]{64})` \|$", table, re.MULTILINE))
    vendored = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (page.FOLDER / "vendor").iterdir()}
    assert vendored == rows and len(rows) == 4


def test_answers_have_token_ids(server: Live, model):
    """Under vLLM's names, in whole answers and in streams."""
    expected = model.generate([MESSAGES[0]["content"]], GREEDY)[0]
    prompt, made = expected.prompt_token_ids, expected.token_ids
    chat = complete(server, return_token_ids=True).json()
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (prompt, made)
    text = complete(server, "completions", return_token_ids=True).json()["choices"][0]
    assert (text["prompt_token_ids"], text["token_ids"]) == (prompt, made)
    assert "token_ids" not in complete(server).json()["choices"][0]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        asked = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        given = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stream": True, "extra_body": asked}
        chunks = list(client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=1, **given))
        assert chunks[0].model_extra["prompt_token_ids"] == prompt
        assert ids_of(chunk.choices[0] for chunk in chunks) == made
        entries = [entry for chunk in chunks if (scored := chunk.choices[0].logprobs) for entry in scored.content]
        assert [entry.token for entry in entries] == [f"token_id:{id}" for id in made]
        assert [bytes(entry.bytes) for entry in entries] == [model.tokenizer.token_bytes(id) for id in made]
        assert [entry.top_logprobs[0].token for entry in entries] == [entry.token for entry in entries]  # greedy
    scored = complete(server, "completions", logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert scored["tokens"] == [f"token_id:{id}" for id in made] == [next(iter(best)) for best in scored["top_logprobs"]]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_from_its_own_tokens(server: Live, stream):
    """With the same tokens, also with a seed: noise depends on the position alone."""
    asked = {"temperature": 1.0, "seed": 5, "return_token_ids": True}
    whole = complete(server, **asked).json()
    made, text = whole["choices"][0]["token_ids"], whole["choices"][0]["message"]["content"]
    begun = {"return_token_ids": True, "answer_token_ids": made[:4]}
    if stream:
        given = {"model": "tiny", "seed": 5, "temperature": 1.0, "max_tokens": 8, "extra_body": begun, "stream": True}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            choices = [chunk.choices[0] for chunk in client.chat.completions.create(messages=MESSAGES, **given)]
        assert "".join(choice.delta.content or "" for choice in choices) == text
        assert ids_of(choices) == made[4:]
    else:
        rest = complete(server, **asked | begun | {"max_tokens": 8}).json()
        assert (rest["choices"][0]["message"]["content"], rest["choices"][0]["token_ids"]) == (text, made[4:])
        assert rest["prompt_token_ids"] == whole["prompt_token_ids"] + made[:4]


def test_tokens_that_an_answer_cannot_begin_with_are_refused(server: Live, model):
    end = min(model.tokenizer.eos_ids)
    for fields, says in [
        ({"answer_token_ids": [model.tokenizer.vocab_size]}, "is not the id of a token"),
        ({"answer_token_ids": [end]}, f"the token {end} ends an answer"),
        ({"answer_token_ids": [5], "continue_final_message": True}, "not together with continue_final_message"),
    ]:
        error = complete(server, **fields)
        assert error.status_code == 400 and error.json()["error"]["param"] == "answer_token_ids"
        assert says in error.json()["error"]["message"]


def test_routing_is_the_model_s(server: Live, model):
    ids = model.tokenizer.encode("Once upon a time")
    expected = server.service.tracer.trace_routing(ids)
    found = WEB.post(f"{server.url}/routing", json={"tokens": ids, "start": 2}).json()
    assert found["expert_ids"] == expected.expert_ids[:, 2:].tolist()
    assert np.abs(np.array(found["expert_weights"]) - expected.expert_weights[:, 2:]).max() <= 5.1e-5
    assert found["layers"] == expected.layers.tolist() and found["num_experts"] == expected.num_experts
    assert WEB.get(f"{server.url}/props").json()["num_experts"] == expected.num_experts
    wrong = WEB.post(f"{server.url}/routing", json={"tokens": [10**6]})
    assert wrong.status_code == 400 and "out of range" in wrong.json()["error"]["message"]
