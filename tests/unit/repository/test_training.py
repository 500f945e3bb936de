"""The scripts that make the tiny model: stories and their filter, the split, the n-gram, resuming, a training that learns."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ferrum_jax as fj
from training import card, corpus, data, export, model, train
from training.ngram import NGram

SMALL = dataclasses.replace(
    train.CONFIG, num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, rope_dim=16, vocab_size=320,
    num_experts=4, expert_intermediate_size=32, context_length=64,
)  # fmt: skip
GOOD = (
    "Pip the mouse found a red kite in the barn. He took it to the hill, but there was no wind at all. "
    '"We must wait," said his friend Rosie. They ate bread and looked at the clouds. Then the leaves began to move, and the '
    "kite went up so high that it was as small as a bird. Pip held on tight and laughed until the sun went down."
)


def text_of(number: int) -> str:
    """A different text for each number."""
    words = [f"{'abcdefghij'[int(digit)]}{'aeiou'[place % 5]}n" for place, digit in enumerate(f"{number * 7919:08d}" * 6)]
    return " ".join(f"{word}{i}" for i, word in enumerate(words)) + "."


# ---- Stories


def test_briefs_differ_and_are_always_the_same():
    found = list(islice(corpus.briefs(), 3000))
    assert len(set(found)) == 3000
    assert found[:100] == list(islice(corpus.briefs(), 100))


class Engine:
    """Stories without a model: the answer is a function of prompt and seed, and takes some steps."""

    def __init__(self, longest: int) -> None:
        self.longest, self.running, self.started = longest, [], 0
        self.model = SimpleNamespace(
            render_chat=lambda messages: messages[0]["content"], tokenizer=SimpleNamespace(eos_ids={2})
        )

    def submit(self, prompt, params):
        text = f" {prompt} {params.seed}"
        result = SimpleNamespace(text=text, token_ids=[1] * len(text), finish_reason="stop")
        request = SimpleNamespace(left=1 + params.seed % self.longest, state="running", result=lambda: result)
        self.running.append(request)
        self.started += 1
        assert params.logit_bias and params.max_tokens
        return request

    def step(self):
        for request in self.running:
            request.left -= 1
            request.state = "running" if request.left > 0 else "finished"
        self.running = [request for request in self.running if request.left > 0]


def test_writing_goes_on_where_it_was_interrupted(tmp_path):
    asked = list(enumerate(islice(corpus.briefs(), 30)))
    corpus.write(Engine(5), asked, tmp_path / "whole.jsonl", slots=4)
    whole = corpus.read_written(tmp_path / "whole.jsonl")
    assert sorted(whole) == list(range(30))

    path = tmp_path / "parts.jsonl"
    corpus.write(Engine(3), asked[:11], path, slots=2)
    path.write_bytes(path.read_bytes()[:-9])  # the last line is cut
    done = corpus.read_written(path)
    assert len(done) == 10
    engine = Engine(7)
    corpus.write(engine, [pair for pair in asked if pair[0] not in done], path, slots=8)
    assert corpus.read_written(path) == whole and engine.started == 20


def test_no_story_is_begun_after_the_time(tmp_path):
    engine = Engine(3)
    corpus.write(engine, enumerate(islice(corpus.briefs(), 5)), tmp_path / "none.jsonl", slots=2, until=-math.inf)
    assert engine.started == 0


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "stop", None),
        (GOOD, "length", "not ended"),
        (GOOD[:-1], "stop", "not ended"),
        (GOOD[:60] + ".", "stop", "too short"),
        (" ".join(text_of(n) for n in range(6)), "stop", "too long"),
        (GOOD.replace("mouse", "m\u00fcse"), "stop", "not ASCII"),
        ("**Pip** " + GOOD, "stop", "markup"),
        ("1. Pip\n\n" + GOOD, "stop", "markup"),
        (GOOD + " The moral of this story is to wait.", "stop", "a remark"),
        ("Here is a story for you. " + GOOD, "stop", "a remark"),
        (GOOD + " Then they all drank beer.", "stop", "grim"),
        (GOOD + " They ate bread and looked at the clouds.", "stop", "repeats itself"),
        (GOOD + " Then " + " and ".join(text_of(1).split()[:30]) + ".", "stop", "endless sentence"),
    ],
)  # fmt: skip
def test_faults(text, finish, reason):
    assert corpus.fault(corpus.tidied(text), finish) == reason


def test_tidied():
    assert (
        corpus.tidied("\u201cYes\u201d \u2013  said\t Pip\u2019s dad\u2026\n\n\n Then\nhe left. ")
        == '"Yes" - said Pip\'s dad...\n\nThen\n\nhe left.'
    )


def test_duplicates_are_dropped_and_counted():
    stories = [GOOD, GOOD.replace("Pip", "Max"), text_of(3)[:-1].replace(" ", ". ") + ".", GOOD[:50]]
    kept, dropped = corpus.sieve({"text": text, "finish_reason": "stop"} for text in stories)
    assert kept[0] == GOOD and dropped["duplicate"] == 1 and sum(dropped.values()) + len(kept) == len(stories)


def test_a_packed_file_is_what_was_packed(tmp_path):
    stories = [GOOD, text_of(1), "Two\n\nparagraphs."]
    size = corpus.pack(stories, tmp_path / "text.xz")
    assert corpus.read_stories(tmp_path / "text.xz") == stories
    assert size == sum(map(len, stories)) + 2 * len(corpus.SEPARATOR) + 1


# ---- Data


def test_split_is_by_text_alone():
    stories = [text_of(n) for n in range(2000)]
    trained, held_out = data.split(stories)
    assert 60 <= len(held_out) <= 140 and sorted(trained + held_out) == sorted(stories)
    again = data.split(reversed(stories[:1000]))
    assert set(again[1]) == set(held_out) & set(stories[:1000])


def test_batches_cover_an_epoch_and_depend_on_the_step_alone():
    stories = [np.array([model.END, *range(1 + 10 * i, 1 + 10 * i + 7)], np.int32) for i in range(25)]
    batches = data.Batches(stories, batch=3, length=8)
    assert batches.steps_per_epoch == (25 * 8 - 1) // 24
    windows = np.concatenate([batches[step] for step in range(batches.steps_per_epoch)])
    assert windows.shape == (24, 9) and len({tuple(window) for window in windows}) == 24
    later = batches[batches.steps_per_epoch + 2]
    assert (data.Batches(stories, batch=3, length=8)[batches.steps_per_epoch + 2] == later).all()
    assert not np.array_equal(batches[2], later)


# ---- The n-gram


def test_bigram_by_hand():
    """Texts "a b" and "a c", 0 their end. Bigrams 0a twice, ab, ac, b0, c0 once: the discount is 4 / (4 + 2) = 2/3. Unigrams
    count what stands before: a, b, c once, 0 twice, of 5: 3 / (3 + 2) = 3/5 is taken off each for an even share of 4."""
    ngram = NGram([np.array([1, 2, 0]), np.array([1, 3, 0])], order=2, vocab_size=4, end=0)

    def unigram(count: int) -> float:
        return (count - 3 / 5) / 5 + 3 / 5 * 4 / 5 * (1 / 4)

    expected = [
        (2 - 2 / 3) / 2 + 2 / 3 * 1 / 2 * unigram(1),  # a after 0
        (1 - 2 / 3) / 2 + 2 / 3 * 2 / 2 * unigram(1),  # b after a
        (1 - 2 / 3) / 1 + 2 / 3 * 1 / 1 * unigram(2),  # 0 after b
    ]
    np.testing.assert_allclose(np.exp(ngram.logprobs(np.array([1, 2, 0]))), expected, rtol=1e-12)


def test_ngram_probabilities_add_up_to_one():
    rng = np.random.default_rng(0)
    texts = [np.append(rng.integers(1, 5, 12), 0) for _ in range(20)]
    ngram = NGram(texts, order=4, vocab_size=5, end=0)
    for context in product(range(5), repeat=3):
        total = sum(math.exp(ngram.logprobs(np.array([*context, token]))[-1]) for token in range(5))
        assert abs(total - 1) < 1e-12


def test_bits_per_byte_and_overlap():
    assert train.bits_per_byte(8 * math.log(2), ["abc", "d"]) == pytest.approx(2)
    told = "one two three four five six seven eight nine"
    assert card.overlap([told], ["zero " + told.removesuffix(" nine") + " ten"]) == 0.5


# ---- Training


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([text_of(n) for n in range(40)], SMALL.vocab_size)


@pytest.fixture(scope="module")
def batches(tokenizer):
    return data.Batches(data.encode(tokenizer, [text_of(n) for n in range(40)]), batch=4, length=32)


@pytest.mark.slow
def test_training_learns_and_goes_on_after_an_interruption(tmp_path, batches):
    recipe = train.Recipe(steps=24, batch=4, length=32, warmup=4, rate=1e-2, dtype="float32")
    whole = train.train(SMALL, recipe, batches, _made(tmp_path / "whole"), 1.0)
    reports = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert reports[-1]["step"] == 24 and reports[-1]["loss"] < reports[0]["loss"] < math.log(SMALL.vocab_size) + 0.5

    parts = _made(tmp_path / "parts")
    train.train(SMALL, recipe, batches, parts, 1.0, minutes=0.0)  # stops after the first step
    part = train.train(SMALL, recipe, batches, parts, 1.0)
    assert part.step == 24
    np.testing.assert_array_equal(part.params["token_embd"], whole.params["token_embd"])
    with pytest.raises(ValueError, match="another model"):
        train.restore(parts / "checkpoint.npz", train.new_state(dataclasses.replace(SMALL, num_layers=1), recipe))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.slow
def test_experts_with_room_for_all_leave_nothing_out():
    """Room for half the rows changes the result, room for as many as come does not."""
    params = model.init(SMALL, 0)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 16)).astype(np.int32)
    exact, routing = model.forward(params, tokens, SMALL)
    room = 4 * max(np.bincount(np.ravel(layer), minlength=4).max() for layer in np.asarray(routing.expert_ids)) / 64
    np.testing.assert_allclose(model.forward(params, tokens, SMALL, room=room)[0], exact, atol=1e-5)
    assert np.abs(model.forward(params, tokens, SMALL, room=0.5)[0] - exact).max() > 1e-2


@pytest.mark.slow
def test_a_story_does_not_see_the_one_before():
    params = model.init(SMALL, 0)
    story, other = np.array([model.END, 7, 8, 9]), np.array([model.END, 5, 6])
    both, _ = model.forward(params, np.concatenate([other, story])[None], SMALL)
    alone, _ = model.forward(params, story[None], SMALL)
    np.testing.assert_allclose(both[0, 3:], alone[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["q8_0", "q4_k"])
def test_the_package_reads_what_was_trained(tmp_path, tokenizer, format):
    """Ids and float32 logits of the directory, and a file that loads and generates."""
    params, stories = model.init(SMALL, 0), ["An old fox.", "Hugo, 12 years!"]
    export.write_directory(tmp_path / "float32", SMALL, params, tokenizer)
    export.write_quantized(tmp_path / "float32", tmp_path / "m.gguf", format)
    train.check(tmp_path / "m.gguf", params, SMALL, tmp_path / "float32", tokenizer, stories)
    loaded = fj.load(tmp_path / "m.gguf", dtype="float32")
    assert len(loaded.generate(["An"], fj.SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    nats = card.nats_of(fj.load(tmp_path / "float32", dtype="float32"), data.encode(tokenizer, stories))
    assert nats == pytest.approx(train.evaluate(params, SMALL, data.encode(tokenizer, stories)).nats, rel=1e-4)
    with pytest.raises(ValueError, match="logits"):
        train.check(tmp_path / "m.gguf", model.init(SMALL, 1), SMALL, tmp_path / "float32", tokenizer, stories)
