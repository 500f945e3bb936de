"""The loop: it learns, goes on with the same bits after it was killed, stops where it should, and the command around it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import finetune
from ferrum_jax.cli import main
from ferrum_jax.finetune.reading import _conversation, example_of
from ferrum_jax.finetune.training import split, time_left
from support import environment
from support.directories import MOE, write

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a hen in a pen has ten", "one two three four five", "to be"]
CONFIG = finetune.LoraConfig(rank=2, targets=("attention", "experts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(MOE, tmp_path_factory.mktemp("model") / "moe")


@pytest.fixture(scope="module")
def model(folder: Path) -> fj.Model:
    return fj.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def examples(model: fj.Model) -> list[finetune.Example]:
    return [finetune.Example(model.tokenizer.encode(text)) for text in TEXTS]


RUN = {
    "steps": 7,
    "length": 32,
    "accumulation": 2,
    "learning_rate": 0.05,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "seed": 3,
}
KILLED = """
import json, os, signal, sys
import ferrum_jax as fj
from ferrum_jax import finetune

def report(one):
    if one.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

folder, checkpoints, texts, targets, run = map(json.loads, sys.argv[1:])
model = fj.load(folder, dtype="float32")
examples = [finetune.Example(model.tokenizer.encode(text)) for text in texts]
config = finetune.LoraConfig(rank=2, targets=targets)
finetune.train(model, examples, config, held_out=examples[:1], checkpoints=checkpoints, report=report, **run)
"""


@pytest.mark.slow
def test_it_learns_and_goes_on_with_the_same_bits(model: fj.Model, folder: Path, examples, tmp_path: Path) -> None:
    """A process that was killed between two checkpoints, with an unfinished one next to them, and one that was not."""
    told: dict[str, list] = {"whole": [], "parts": []}

    def run(name: str) -> finetune.LoraAdapter:
        where = {"checkpoints": tmp_path / name, "report": told[name].append}
        return finetune.train(model, examples, CONFIG, held_out=examples[:1], **where, **RUN)

    whole = run("whole")
    given = map(json.dumps, (str(folder), str(tmp_path / "parts"), TEXTS, CONFIG.targets, RUN))
    ended = subprocess.run([sys.executable, "-c", KILLED, *given], env=environment(), check=False)
    assert ended.returncode == -signal.SIGKILL
    (tmp_path / "parts" / "step-00000006.partial-1").mkdir()
    again = run("parts")
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True))
    losses = [[(one.step, one.loss, one.gradient_norm, one.held_out_loss) for one in told[name]] for name in told]
    assert losses[1] == losses[0]  # what was reported before is reported again
    assert [one.seconds for one in told["parts"]][:4] != [one.seconds for one in told["whole"]][:4]  # by the other process
    assert losses[0][-1][1] < 0.9 * losses[0][0][1]
    assert [one.step for one in told["whole"] if one.held_out_loss is not None] == [3, 6, 7]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["step-00000006", "step-00000007"]
    with pytest.raises(ValueError, match="step-00000007: is a checkpoint of another training: its rank is 2, not 3"):
        finetune.train(model, examples, finetune.LoraConfig(rank=3), steps=7, length=32, checkpoints=tmp_path / "whole")


@pytest.mark.slow
def test_what_is_not_finite_names_the_step(model: fj.Model, examples, tmp_path: Path) -> None:
    with pytest.raises(fj.NotFiniteError, match=r"step [2-9]: the loss is \S+ and the norm of its gradient (nan|inf)"):
        finetune.train(model, examples, CONFIG, steps=9, length=32, learning_rate=1e30, warmup=0, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_early_stop_keeps_the_best(model: fj.Model, examples) -> None:
    """With a rate that destroys the model, after the first measurement nothing is better."""
    told = []
    finetune.train(
        model, examples[1:], CONFIG, steps=50, length=32, learning_rate=0.3, warmup=0, held_out=examples[:1],
        evaluate_every=1, patience=2, report=told.append,
    )  # fmt: skip
    losses = [one.held_out_loss for one in told]
    assert len(losses) < 50 and min(losses[-2:]) >= min(losses[:-2])


@pytest.mark.parametrize(("done", "left"), [(1, "1.5 h"), (99, "9 s"), (100, "0 s"), (11, "13 min")])
def test_time_left(done: int, left: str) -> None:
    """The first step, which compiles, counts only as long as there are few others."""
    history = [finetune.Report(step + 1, 1.0, 1.0, 1.0, None, 9.0 if step else 54.6) for step in range(done)]
    assert time_left(history, 100) == left


def test_the_split_depends_on_tokens_alone() -> None:
    examples = [finetune.Example([i, i + 1]) for i in range(400)]
    learned, measured = split(examples, 0.1)
    assert 20 <= len(measured) <= 60 and len(learned) + len(measured) == 400
    assert split(examples[::-1], 0.1)[1] == measured[::-1]
    with pytest.raises(ValueError, match=r"held_out 0\.1: of 1 examples it leaves [01] and takes [01]"):
        split([finetune.Example([1, 2])], 0.1)


# ---- reading


def learned_text(example: finetune.Example, model: fj.Model) -> str:
    ids = [id for id, learned in zip(example.tokens, example.learned, strict=True) if learned]
    return b"".join(map(model.tokenizer.token_bytes, ids)).decode()


def test_what_is_learned_of_a_conversation(model: fj.Model, tmp_path: Path) -> None:
    """Each answer with the end of its turn, and nothing of the user's."""
    turns = [("user", "hi"), ("assistant", "hé"), ("user", "bye"), ("assistant", "so long")]
    file = tmp_path / "data.jsonl"
    messages = [{"role": role, "content": content} for role, content in turns]
    file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"prompt": "2 + 2 = ", "completion": "4"}) + "\n")
    (chat, completion), cut = finetune.read_examples(file, model, 512)
    assert cut == 0
    assert list(chat.tokens) == model.encode_rendered(model.render_chat(messages, add_generation_prompt=False))
    assert learned_text(chat, model) == "hé<|im_end|>\nso long<|im_end|>\n"
    assert learned_text(completion, model) == "4<|endoftext|>"


MARKED = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}

{%- else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{%- endif %}
{%- endfor %}"""


def test_generation_markers(model: fj.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text and the spans that transformers 5.24.0 finds with `return_assistant_tokens_mask`; nothing else is learned."""
    monkeypatch.setattr(model.tokenizer, "chat_templates", {"default": MARKED})
    turns = [("user", "{% generation %} hi"), ("assistant", " hé "), ("user", "bye"), ("assistant", "so long")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, spans = _conversation({"messages": messages}, model)
    assert text == model.render_chat(messages, add_generation_prompt=False)
    assert spans == [(68, 80), (132, 149)] and [text[slice(*span)] for span in spans] == ["hé<|im_end|>", "so long<|im_end|>"]
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:1]}) + "\n")
    assert learned_text(example_of({"messages": messages}, model), model) == "hé<|im_end|>so long<|im_end|>"
    with pytest.raises(ValueError, match=r"line 2: there is no message of the assistant to learn"):
        finetune.read_examples(file, model, 512)


def test_long_texts(model: fj.Model, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "abcdefghij" * 3}) + "\n" + json.dumps({"prompt": "a", "completion": "bcd" * 9}) + "\n")
    (*pieces, last), cut = finetune.read_examples(file, model, 12)
    assert [len(piece.tokens) for piece in pieces] == [12, 12, 7] and cut == 1 and len(last.tokens) == 12
    assert [id for piece in pieces for id in piece.tokens] == [
        *model.tokenizer.encode("abcdefghij" * 3),
        model.tokenizer.eos_id,
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", 'must be an object with "text"'),
        ('{"text": 3}', "texts must be strings"),
        ('{"prompt": "a"}', "texts must be strings"),
        ('{"messages": []}', "messages must be a list of objects with role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "there is no message of the assistant to learn"),
    ],
)
def test_wrong_lines(line: str, said: str, model: fj.Model, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "ab"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl: line 2: .*{said}"):
        finetune.read_examples(file, model, 64)


# ---- the command


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ["--steps", "2", "--length", "32", "--dtype", "float32", "--target", "attention", "--rank", "3"]
    assert main(["finetune", str(folder), str(data), str(out), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in found["steps"]] == [1, 2] and found["examples"] == len(TEXTS)
    header = "step,loss,gradient_norm,tokens_per_second,held_out_loss,seconds\n1,"
    assert (out / "losses.csv").read_text().startswith(header)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    loaded = fj.load(folder, dtype="float32", adapters={"it": out})
    assert np.isfinite(loaded.logits([[1, 2, 3]], "it")[0]).all()
    assert main(["finetune", str(folder), str(data), str(out), *flags]) == 2
    assert "out exists" in capsys.readouterr().err
