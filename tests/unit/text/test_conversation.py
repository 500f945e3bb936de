"""A conversation in an engine: a turn costs only its new tokens, nothing compiles late, and ids that were read do not
change."""

import os
import random
import signal
import time
from types import SimpleNamespace

import jax
import pytest

import ferrum_jax as fj
from ferrum_jax.chat import render
from ferrum_jax.cli import chat, commands
from ferrum_jax.cli.conversation import Conversation, Transcript, open_engine
from ferrum_jax.tokenizer import Tokenizer
from support.tiny_gguf import TEMPLATE, write_tiny_llama
from unit.text.test_tokenizer import BPE, SPM, TIES

PAGE = fj.EngineConfig().page_size
NO_CONTROL = {id: float("-inf") for id in range(3)}  # an answer of the requested length, all of it text
LETTERS = "abcdefghij klmnop qrstu vwxyz the and .,"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fj.load(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=2048), dtype="float32")


def words(length, seed=0):
    return "".join(random.Random(seed).choices(LETTERS, k=length)).strip() or "a"


def turn(talk, text):
    """The answer to a text, and how many prompt tokens it cost."""
    before = talk.engine.metrics()["prompt_tokens"]
    answer = talk.answer([*talk.messages, {"role": "user", "content": text}], lambda piece: None)
    return answer, talk.engine.metrics()["prompt_tokens"] - before


def added(model, text):
    """Tokens of a rendered user message, the end of the answer before it, and the beginning of the next one."""
    return len(model.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False, True))


def later_turns_cost_what_is_new(model):
    params = fj.SamplingParams(max_tokens=40, temperature=1.0, seed=3, logit_bias=NO_CONTROL)
    with open_engine(model) as engine:
        talk = Conversation(model, engine, params, template={})
        for number, length in enumerate((300, 5, 60, 130, 1, 20)):
            text = words(length, number)
            answer, cost = turn(talk, text)
            assert cost <= PAGE + added(model, text), f"turn {number} of {answer.usage['prompt_tokens']} tokens cost {cost}"
            assert answer.usage["cached_tokens"] == answer.usage["prompt_tokens"] - cost
        assert answer.usage["prompt_tokens"] > 700


@pytest.mark.slow
def test_later_turns_cost_what_is_new(model):
    later_turns_cost_what_is_new(model)


@pytest.mark.slow
def test_answers_are_those_of_generate(model):
    params = fj.SamplingParams(max_tokens=24, temperature=0.0)
    with open_engine(model) as engine:
        talk = Conversation(model, engine, params, system="be the one", template={})
        for number in range(3):
            answer, _ = turn(talk, words(40, number))
            expected = model.generate([talk.ids(talk.asked)], params)[0]
            assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)


@pytest.mark.slow
def test_nothing_compiles_between_answers(model):
    """After the warm-up, turns that cross every size of a step and of the cache."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    params = fj.SamplingParams(max_tokens=30, temperature=1.0, seed=3, logit_bias=NO_CONTROL)
    with open_engine(model) as engine:
        talk = Conversation(model, engine, params, template={})
        turn(talk, "the first")
        end = time.monotonic() + 300
        while engine.warmed_up[0] < engine.warmed_up[1]:
            assert time.monotonic() < end
            time.sleep(0.05)
        count = engine.metrics()["compiles"]
        compiled.clear()
        for number, length in enumerate((1, 15, 40, 100, 230, 400, 2, 500)):
            turn(talk, words(length, number))
        turn(talk, talk.messages[0]["content"])
        assert (engine.metrics()["compiles"], compiled) == (count, [])
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_a_full_context_ends_the_answer_and_then_refuses(model):
    params = fj.SamplingParams(max_tokens=1 << 20, temperature=1.0, seed=3, logit_bias=NO_CONTROL)
    with open_engine(model) as engine:
        talk = Conversation(model, engine, params, template={})
        answer, _ = turn(talk, words(1600))
        assert answer.finish_reason == "length"
        assert sum(answer.usage[key] for key in ("prompt_tokens", "completion_tokens")) == engine.context == 2048
        said = list(talk.messages)
        with pytest.raises(ValueError, match="no room in a context of"):
            turn(talk, "more")
        assert talk.messages == said


def test_the_answer_after_ctrl_c_stays_and_is_not_read_again(model):
    params = fj.SamplingParams(max_tokens=1500, temperature=1.0, seed=3, logit_bias=NO_CONTROL)
    with open_engine(model) as engine:
        talk = Conversation(model, engine, params, template={})
        turn_text = words(50)
        pieces = []

        def show(piece):
            pieces.append(piece)
            if sum(map(len, pieces)) > 60:
                os.kill(os.getpid(), signal.SIGINT)

        answer = talk.answer([{"role": "user", "content": turn_text}], show)
        assert answer.finish_reason == "abort" and answer.text == "".join(pieces)
        assert talk.messages[-1] == {"role": "assistant", "content": answer.text}
        talk.params = fj.SamplingParams(max_tokens=4)
        _, cost = turn(talk, "go on")
        assert cost <= PAGE + added(model, "go on")
        deadline = time.monotonic() + 60
        while engine.metrics()["requests_running"]:
            assert time.monotonic() < deadline


# Ids of a text that grows


def chars(tokenizer, text):
    """Ids of a text, one per character, as a tokenizer with merges would not split it."""
    return [id for letter in text for id in tokenizer.encode(letter, False)]


def rendered(messages, template=TEMPLATE):
    return render(template, messages)


def sampled_ids_stay(model):
    """Sampled ids are kept, though the tokenizer would split the text differently; the rest is split by the tokenizer."""
    tokenizer, transcript = model.tokenizer, Transcript(model)
    messages, ids = [], []
    for number in range(4):
        messages.append({"role": "user", "content": words(30, number)})
        text = rendered(messages)
        before, ids = ids, transcript.encode(text)
        assert ids[: len(before)] == before
        assert tokenizer.decode(ids, skip_special=False) == text
        answer = "the and in then" + words(5, number)
        made = chars(tokenizer, answer)
        assert made != tokenizer.encode(answer, False)
        transcript.said(answer, [*made, tokenizer.eos_id])
        ids = ids + made
        messages.append({"role": "assistant", "content": answer})


def test_sampled_ids_stay(model):
    sampled_ids_stay(model)


THINKING = TEMPLATE.replace("message['content']", "message['content'].split('Q')[-1]")
TRIMMING = TEMPLATE.replace("message['content']", "message['content'] | trim")
NO_END = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, THINKING, TRIMMING, NO_END], ids=["plain", "thinking", "trimming", "no end"])
def test_canonical_answers_make_the_ids_of_the_whole_text(model, template):
    """Whatever a template makes of an answer in later turns."""
    encode, transcript = model.tokenizer.encode, Transcript(model)
    messages = []
    for number in range(6):
        messages.append({"role": "user", "content": words(20, number)})
        text = rendered(messages, template)
        assert transcript.encode(text) == encode(text, True, True)
        answer = (" the thought Q" if number % 2 else "") + words(9, number) + ("\n " if number % 3 else "")
        transcript.said(answer, encode(answer, False))
        messages.append({"role": "assistant", "content": answer})


def test_what_does_not_stand_for_the_text_is_not_kept(model):
    """A stop string is cut from the text and not from the ids."""
    tokenizer, transcript = model.tokenizer, Transcript(model)
    text = rendered([{"role": "user", "content": "a"}])
    transcript.encode(text)
    transcript.said("the", chars(tokenizer, "the end"))
    longer = text + "the<|im_end|>\n"
    assert transcript.encode(longer) == tokenizer.encode(longer, True, True)


def test_another_conversation_begins_anew(model):
    transcript = Transcript(model)
    for text in (rendered([{"role": "user", "content": words(20, seed)}]) for seed in (1, 2, 1, 1)):
        assert transcript.encode(text) == model.tokenizer.encode(text, True, True)


@pytest.mark.parametrize("data", [BPE, SPM, TIES], ids=["bpe", "spm", "spm_ties"])
@pytest.mark.parametrize("adds_end", [False, True])
def test_ids_of_other_vocabularies(data, adds_end):
    """Sampled ids are kept wherever a vocabulary puts spaces, but not if it ends every text with a token."""
    metadata = data["metadata"] | {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_eos_token": adds_end}
    tokenizer = Tokenizer.from_gguf(metadata)

    def whole(text):
        return tokenizer.encode(text, True, True)

    transcript, text, end = Transcript(SimpleNamespace(tokenizer=tokenizer, encode_rendered=whole)), "", "</s>"
    for number, message in enumerate(data["texts"]):
        text += f"{message}{end}"
        ids = transcript.encode(text)
        if adds_end:
            assert ids == whole(text)
            continue
        answer = tokenizer.encode(f"the answer {number} of  some", False)
        said = b"".join(map(tokenizer.token_bytes, answer)).decode()
        transcript.said(said, answer)
        text += said
        rest = f"{end}more{end}"
        assert transcript.encode(text + rest) == ids + answer + tokenizer.encode(rest, False, True)
        text += end


# The chat around it


def test_show(model, capsys, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE + "{% if enable_thinking %}{% endif %}")
    params = fj.SamplingParams(max_tokens=4, temperature=0.5, stop=["END"])
    talk = chat.Chat(model, params, system="be brief", template={"enable_thinking": False})
    talk.name = "tiny"
    with talk.engine:
        talk.answer([{"role": "user", "content": "the " * 100}])
        capsys.readouterr()
        assert commands.obey(talk, "/show")
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    used = len(model.encode_chat([{"role": "system", "content": "be brief"}, *talk.conversation.asked])) + 4
    assert rows["model"] == "tiny: llama, 2 layers, float32"
    assert (rows["temperature"], rows["stop"], rows["enable_thinking"]) == ("0.5", '["END"]', "off")
    assert rows["system"] == "be brief" and rows["conversation"] == f"2 messages, {used} of 2,048 tokens"
    assert rows["user"].startswith("the the the") and rows["user"].endswith("...") and "assistant" in rows
