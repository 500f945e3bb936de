"""llama.cpp on the tiny model's file: how often it agrees with this package on the likeliest next token after the same text.

pip install xllamacpp
python -m training.peer
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import ferrum_jax as fj
from benchmarks.llama_cpp import LlamaCpp
from training import corpus, data, train

OUT = Path(__file__).parents[1] / "tests" / "goldens" / "tiny-moe.json"


def predictions(path: Path, texts: Sequence[Sequence[int]], threads: int = 2) -> list[list[int]]:
    """The likeliest token after each beginning of texts of token ids, by llama.cpp."""
    with LlamaCpp(path, threads=threads, context=max(map(len, texts)) + 1) as peer:
        return [[peer.generate(list(ids[: i + 1]), 1)[0] for i in range(len(ids))] for ids in texts]


def agreement(loaded: fj.Model, texts: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens of `theirs` that a model predicts too."""
    ours = [logits.argmax(-1) for logits in loaded.logits(texts)]
    return float(np.mean(np.concatenate(ours) == np.concatenate([np.asarray(row) for row in theirs])))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the tiny model's next tokens with those of llama.cpp.")
    parser.add_argument("--model", type=Path, default=train.OUT)
    parser.add_argument("--stories", type=Path, default=corpus.OUT)
    parser.add_argument("--count", type=int, default=8, help="held-out stories to compare on")
    parser.add_argument("--out", type=Path, default=OUT, help="where the token ids and llama.cpp's predictions are kept")
    options = parser.parse_args()
    loaded = fj.load(options.model, dtype="float32")
    _, held_out = data.split(corpus.read_stories(options.stories))
    texts = [loaded.tokenizer.encode(story) for story in held_out[: options.count]]
    theirs = predictions(options.model, texts)
    options.out.write_text(json.dumps({"texts": texts, "llama.cpp": theirs}) + "\n")
    share = agreement(loaded, texts, theirs)
    print(f"of {sum(map(len, texts)):,} likeliest next tokens {share:.1%} are llama.cpp's")
    if share < 0.95:
        raise SystemExit("fewer than 95 % agree")


if __name__ == "__main__":
    main()
