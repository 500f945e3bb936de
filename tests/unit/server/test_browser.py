"""The chat page in Chromium: one browser, one server, the bundled model; what a model cannot be made to say is scripted."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ferrum_jax as fj
from support.live_server import Live, idle, live, until

driver = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra `test`, is not installed")
expect = driver.expect
expect.set_options(timeout=60_000)  # programs are compiled, and the machine may be busy
SHOTS = os.environ.get("FERRUM_JAX_SCREENSHOTS")  # a folder for pictures of the page
QUESTION = "Once upon a time there was a"
SETTINGS = {"temperature": "0", "max_tokens": "24"}
GREEDY = fj.SamplingParams(max_tokens=24, temperature=0.0, logprobs=8)
UNSAFE = """# Title

<script>window.harmed = 1</script> <img src=x onerror="window.harmed = 1">

![a picture](https://example.com/spy.png) <a href="javascript:window.harmed=1">three</a>

[one](javascript:window.harmed=1) [two](data:text/html,x) [good](https://example.com/)

| a | b |
|:-:|---|
| **c** | `d` |

```python
print("<b>")
```
"""


@pytest.fixture(scope="module")  # while it lives, its event loop runs in this thread, where other tests run theirs
def browser() -> Iterator[driver.Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing = "the page is tested in Chromium, which is not installed (Debian and Ubuntu: apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: driver.Browser, server: Live) -> Iterator[driver.Page]:
    """The page with short greedy answers; an error in its script or against its policy fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme="light")
    context.add_init_script(f"localStorage.ferrum_jax ??= {json.dumps(json.dumps(SETTINGS))}")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda line: errors.append(line.text) if line.type == "error" and "status of 4" not in line.text else None
    )
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert not errors


def picture(page: driver.Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def ask(page: driver.Page, text: str = QUESTION) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: driver.Page) -> str:
    """The text of the last answer, when it has ended."""
    expect(page.locator(".answer").last.locator(".actions")).to_be_visible()
    return page.locator(".answer .markdown").last.inner_text()


def scripted(*deltas: dict, other: int = 0) -> Callable[[driver.Route], None]:
    """Answers with these pieces of a message, each a token if it has content. `other`: the token that was nearly chosen."""
    chunks = []
    for id, delta in enumerate(({"role": "assistant", "content": ""}, *deltas)):
        best = [{"token": f"token_id:{other}", "bytes": [33], "logprob": -1.5}]
        entry = {"token": f"token_id:{id}", "bytes": list(delta.get("content", "").encode()), "logprob": -0.5}
        scored = {"content": [entry | {"top_logprobs": best}]} if entry["bytes"] else None
        chunks.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": scored}]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return lambda route: route.fulfill(content_type="text/event-stream", body="".join(lines))


@pytest.mark.slow
def test_a_chat_and_what_the_model_considered(page: driver.Page, engine):
    """An answer, the card of a token, a branch, and the way back."""
    ask(page)
    first = answered(page)
    expected = engine.submit(QUESTION, GREEDY).result()
    assert first == expected.text.strip()
    expect(page.locator(".answer .note")).to_contain_text("24 tokens")
    token = page.locator(".answer .markdown .t").nth(3)
    chosen = token.inner_text().strip()
    token.hover()
    card = page.get_by_role("dialog", name="Probabilities of a token")
    expect(card.locator(".choice")).to_have_count(9)  # with "all others"
    index = int(token.get_attribute("data-index") or "")
    shown = card.locator(".choice:not(.note) span:last-child").all_inner_texts()
    chances = [float(text.removesuffix(" %").removeprefix("< ")) for text in shown]
    assert chances == sorted(chances, reverse=True)
    picture(page, "card")
    card.get_by_role("button").first.click()
    expect(page.locator(".branches").last).to_contain_text("2/2")
    second = answered(page)
    kept = engine.model.tokenizer.decode(expected.token_ids[:index]).strip()
    assert second != first and second.startswith(kept)
    other = expected.logprobs[index][2][0]  # of (chosen, best, second)
    ids = [*expected.prompt_token_ids, *expected.token_ids[:index], other]
    begun = engine.model.tokenizer.decode([*expected.token_ids[:index], other])
    assert second == (begun + engine.submit(ids, GREEDY).result().text).strip()
    page.locator(".answer .markdown .t").nth(3).hover()
    expect(card.get_by_role("button").first).to_contain_text(chosen)
    page.get_by_role("button", name="Earlier branch").click()
    assert answered(page) == first
    ask(page, "And then")
    assert answered(page) != first
    expect(page.locator(".question")).to_have_count(2)


def test_tokens_colors_and_experts_by_keyboard(page: driver.Page):
    ask(page)
    answered(page)
    page.get_by_role("button", name="Tokens").click()
    tokens = page.locator(".tokens .t")
    expect(tokens).to_have_count(24)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#lens")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#lens button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#lens")).to_be_hidden()
    expect(tokens.nth(1)).to_be_focused()
    page.get_by_role("button", name="Color by probability").click()
    colors = set(tokens.evaluate_all("tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"))
    assert len(colors) > 10
    page.get_by_role("button", name="Experts").click()
    caption = page.locator(".experts figcaption")
    expect(caption).to_contain_text("24 tokens: ")
    shades = """canvas => new Set(new Uint32Array(
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    assert page.locator(".experts canvas").evaluate(shades) > 4
    tokens.nth(5).hover()
    expect(caption).to_contain_text("token 6: ")
    picture(page, "experts")


def test_editing_and_answering_again(page: driver.Page):
    ask(page)
    first = answered(page)
    page.get_by_role("button", name="Answer again").click()
    assert answered(page) == first  # greedy
    page.locator(".question").hover()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Your message").fill("The little dog")
    page.keyboard.press("Enter")
    assert answered(page) != first
    expect(page.locator(".question .branches")).to_contain_text("2/2")
    page.locator(".question").get_by_role("button", name="Earlier branch").click()
    expect(page.locator(".answer .branches")).to_contain_text("2/2")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#welcome")).to_be_visible()
    picture(page, "welcome")


def test_an_answer_is_stopped_and_goes_on(page: driver.Page, engine, monkeypatch):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("150")
    page.keyboard.press("Escape")
    advance, hurried = engine._advance, threading.Event()

    def slowly() -> bool:
        hurried.wait(0.03)
        return advance()

    monkeypatch.setattr(engine, "_advance", slowly)
    ask(page)
    expect(page.locator(".answer .markdown").last).not_to_be_empty()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    begun = answered(page)
    expect(page.locator(".answer .note")).to_contain_text("stopped")
    until(lambda: idle(engine))
    hurried.set()
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".answer .note")).to_contain_text("tokens/s")
    assert answered(page).startswith(begun) and len(answered(page)) > len(begun)


def test_what_a_model_writes_is_harmless(page: driver.Page):
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url) if "example.com" in request.url else None)
    pieces = re.findall(r"\s?\S{1,3}|\s", UNSAFE)
    page.route("**/v1/chat/completions", scripted(*({"content": piece} for piece in pieces)))
    ask(page, "<b>bold</b>")
    text = answered(page)
    assert '<script>window.harmed = 1</script> <img src=x onerror="window.harmed = 1">' in text and 'print("<b>")' in text
    assert page.locator(".bubble").inner_text() == "<b>bold</b>"
    answer = page.locator(".answer .markdown").last
    assert answer.locator("script, img, b, [onerror]").count() == 0
    assert [a.get_attribute("href") for a in answer.locator("a[href]").all()] == [
        "https://example.com/spy.png",
        "https://example.com/",
    ]
    assert answer.locator("a[href]").last.get_attribute("rel") == "noopener noreferrer nofollow"
    expect(answer.locator("td strong")).to_have_text("c")
    expect(answer.locator(".code-head")).to_have_text("python")
    assert page.evaluate("window.harmed") is None and not outside
    marks = answer.locator(".t").evaluate_all("all => all.map(one => [Number(one.dataset.index), one.textContent])")
    assert all(text.strip() in pieces[index] for index, text in marks)
    assert len({index for index, _ in marks}) > 60
    assert [index for index, _ in marks] == sorted(index for index, _ in marks)
    picture(page, "markdown")


def test_an_answer_can_end_where_the_model_nearly_ended_it(page: driver.Page, model):
    words = scripted(*({"content": text} for text in ("One", " two", " three")), other=min(model.tokenizer.eos_ids))
    page.route("**/v1/chat/completions", words)
    ask(page)
    assert answered(page) == "One two three"
    page.get_by_text("three").hover()
    page.get_by_role("button", name="end of the answer").click()
    expect(page.locator(".branches").last).to_contain_text("2/2")
    assert answered(page) == "One two"


def test_thinking_and_tool_calls(page: driver.Page):
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    page.route(
        "**/v1/chat/completions",
        scripted(
            {"reasoning_content": "The weather **service**"},
            {"reasoning_content": " knows."},
            {"tool_calls": [call]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '"Graz"}'}}]},
        ),
    )
    ask(page)
    answered(page)
    thoughts = page.locator(".thinking .markdown")
    expect(thoughts).to_be_hidden()
    page.get_by_text("Thoughts").click()
    expect(thoughts).to_have_text("The weather service knows.")
    section = page.get_by_role("region", name="Call of weather")
    expect(section.locator("pre")).to_have_text('{\n  "city": "Graz"\n}')
    section.get_by_label("Result of weather").fill("22 degrees")
    picture(page, "tools")
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        section.get_by_role("button", name="Send results").click()
    messages = (sent.value.post_data_json or {})["messages"]
    given = {"name": "weather", "arguments": '{"city": "Graz"}'}
    assert messages[1]["tool_calls"] == [{"id": "call_1", "type": "function", "function": given}]
    assert messages[2] == {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "22 degrees"}
    answered(page)


def test_errors_of_the_server_are_shown(page: driver.Page):
    ask(page, "word " * 400)
    expect(page.get_by_role("alert")).to_contain_text("do not fit into a context of 256")


def test_a_key_is_asked_for(page: driver.Page, engine):
    with live(engine, api_keys=("first",)) as server:
        page.goto(server.url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.locator("#model")).to_have_text("the API key is missing or wrong")
        field.fill("first")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        ask(page)
        assert answered(page)


def test_light_dark_and_narrow(page: driver.Page):
    page.route("**/v1/chat/completions", scripted({"content": UNSAFE}))
    ask(page, "Show me what you can do.")
    answered(page)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light == "rgb(252, 251, 249)" and dark == "rgb(22, 22, 24)"
    picture(page, "dark")
    switch = page.get_by_role("button", name=re.compile("^Colors: "))
    switch.click()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page, "Show me what you can do.")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, "narrow")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0")
    picture(page, "settings")
