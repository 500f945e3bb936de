"""Writes the model card of the tiny model from its file, the float32 model of the training and the held-out stories.

python -m training.card --work build/tiny-moe
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import ferrum_jax as fj
from ferrum_jax.cli.inspect import describe
from ferrum_jax.weights.opening import open_model
from training import corpus, data, model, train
from training.ngram import NGram

OUT = Path(__file__).parents[1] / "docs" / "tiny-model-card.md"
PROMPT, SAMPLES = "Once upon a time", 20
SAMPLING = {"max_tokens": 300, "temperature": 0.8, "top_p": 0.95}
ROWS = 16  # stories scored at a time
ORDER = 4


def nats_of(loaded: Any, stories: Sequence[np.ndarray]) -> float:
    """Nats that a loaded model needs for stories (int32 [tokens] each, END first) and for the END after each."""
    total = 0.0
    for first in range(0, len(stories), ROWS):
        part = [story.tolist() for story in stories[first : first + ROWS]]
        for ids, logits in zip(part, loaded.logits(part), strict=True):
            logits = logits.astype(np.float64)
            best = logits.max(-1, keepdims=True)
            norm = np.log(np.exp(logits - best).sum(-1)) + best[:, 0]
            total += float((norm - logits[np.arange(len(ids)), [*ids[1:], model.END]]).sum())
    return total


def ngram_nats(trained: Sequence[np.ndarray], held_out: Sequence[np.ndarray], vocab_size: int) -> float:
    """Nats that an interpolated Kneser-Ney 4-gram model of the training stories needs for the held-out ones."""

    def texts(stories: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.append(story[1:], model.END) for story in stories]

    ngram = NGram(texts(trained), ORDER, vocab_size, model.END)
    return -sum(float(ngram.logprobs(text).sum()) for text in texts(held_out))


def overlap(texts: Sequence[str], stories: Sequence[str]) -> float:
    """The share of the texts' distinct runs of eight words that occur in the stories."""
    own = set().union(*map(corpus.grams, texts))
    return len(own & set().union(*map(corpus.grams, stories))) / max(1, len(own))


def samples(loaded: Any) -> list[str]:
    params = [fj.SamplingParams(seed=seed, **SAMPLING) for seed in range(SAMPLES)]
    return [PROMPT + completion.text for completion in loaded.generate([PROMPT] * SAMPLES, params)]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    for row in (columns, ["---"] * len(columns), *rows):
        yield "| " + " | ".join(map(str, row)) + " |"


def card(path: Path, work: Path, stories: Path) -> Iterator[str]:
    """The lines of the card."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    trained, held_out = data.split(corpus.read_stories(stories))
    trained_ids, held_out_ids = data.encode(tokenizer, trained), data.encode(tokenizer, held_out)
    loaded, exact = fj.load(path, dtype="float32"), fj.load(work / "float32", dtype="float32")
    config = exact.config
    state = train.restore(work / "checkpoint.npz", train.new_state(config, train.Recipe(steps=1)))
    # The load of the experts is measured on the float32 model, with the training's own forward pass.
    load = train.evaluate(state.params, config, held_out_ids).load
    untrained = train.evaluate(model.init(config, train.Recipe.seed), config, held_out_ids).nats
    scores = {
        f"this file ({train.FORMAT.upper()})": nats_of(loaded, held_out_ids),
        "the same in float32": nats_of(exact, held_out_ids),
        f"{ORDER}-gram of tokens, interpolated Kneser-Ney": ngram_nats(trained_ids, held_out_ids, config.vocab_size),
        "untrained": untrained,
    }
    told = samples(fj.load(path))
    with open_model(path) as source:
        facts = describe(source)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]

    yield "# The tiny model\n"
    yield from about(facts, config, state, log[-1], trained, trained_ids)
    yield "\n## Held-out stories\n"
    size = sum(map(len, held_out))
    yield f"{len(held_out):,} stories that were not trained on (chosen by a hash of their text), {size:,} bytes. The end of a"
    yield "story is a token and counts.\n"
    rows = [(name, f"{train.bits_per_byte(nats, held_out):.4f}") for name, nats in scores.items()]
    yield from table(("model", "bits per byte"), rows)
    yield "\n## Load of experts\n"
    yield f"Share of the choices on held-out stories, in percent; {100 / config.num_experts:.1f} would be even.\n"
    columns = ("layer", *(f"expert {i}" for i in range(config.num_experts)))
    yield from table(columns, [(number, *(f"{100 * share:.1f}" for share in row)) for number, row in enumerate(load)])
    yield "\n## Samples\n"
    shared, usual = overlap(told, trained), overlap(held_out, trained)
    yield f"The first {SAMPLES}, seeds 0 to {SAMPLES - 1}, none left out: prompt `{PROMPT}`, temperature"
    yield f"{SAMPLING['temperature']}, top_p {SAMPLING['top_p']}, at most {SAMPLING['max_tokens']} tokens. Of their runs of"
    yield f"eight words {shared:.1%} occur in the training text; of those of held-out stories {usual:.1%} do.\n"
    for seed, text in enumerate(told):
        yield f"**{seed}.** {text.strip()}\n"


def about(
    facts: dict, config, state: train.State, last: dict, trained: Sequence[str], ids: Sequence[np.ndarray]
) -> Iterator[str]:
    recipe = train.Recipe(steps=state.step)
    inactive = config.num_experts - config.experts_per_token
    active = facts["parameters"] - config.num_layers * inactive * 3 * config.hidden_size * config.expert_intermediate_size
    tokens = sum(map(len, ids))
    yield "A Qwen3-MoE that tells short, simple stories in English, and does nothing else. It is in the package so that there"
    yield "is a real, trained mixture of experts without a network: for tests, notebooks and a first `ferrum-jax run`. It knows"
    yield "nothing, follows no instructions, and its stories contradict themselves.\n"
    yield from table(
        ("", ""),
        [
            ("file", f"{facts['file_bytes']:,} bytes, " + ", ".join(f"{row['format']}" for row in facts["formats"])),
            ("parameters", f"{facts['parameters']:,}, of which {active:,} take part in a token"),
            (
                "layers",
                f"{config.num_layers} of width {config.hidden_size}, {config.num_heads} heads, {config.num_kv_heads} of KV",
            ),
            ("experts", f"{config.num_experts} of width {config.expert_intermediate_size}, {config.experts_per_token} a token"),
            ("vocabulary", f"{config.vocab_size:,}, byte-level BPE of the training text"),
            ("context", f"{config.context_length} tokens; trained on windows of {recipe.length}"),
            ("text", f"{len(trained):,} stories, {sum(map(len, trained)):,} bytes, {tokens:,} tokens"),
            (
                "training",
                f"{state.step:,} steps of {recipe.batch * recipe.length:,} tokens, {last['minutes']} minutes on two cores",
            ),
            ("licence", "Apache-2.0, the text too"),
            ("origin of the text", f"written for this by SmolLM2-135M-Instruct (Apache-2.0), `{Path(corpus.__file__).name}`"),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model card of the tiny model.")
    parser.add_argument("--model", type=Path, default=train.OUT)
    parser.add_argument("--work", type=Path, default=train.WORK, help="what the training left")
    parser.add_argument("--stories", type=Path, default=corpus.OUT)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    lines = list(card(options.model, options.work, options.stories))
    options.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
