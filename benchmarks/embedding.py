"""Embedding throughput on the CPU, alternating with sentence-transformers on the same directory and texts.

    pip install sentence-transformers
    python -m benchmarks.embedding PATH_OF_ALL_MINILM_L6_V2

Texts of 4 to 200 words cut from an English text, in float32 on all cores; each round embeds all of them once with each library.
Check: the largest difference between the vectors of the two, which have length 1.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ferrum_jax as fj
from benchmarks import common

ROUNDS, BOUND = 5, 1e-5
TEXTS = {"short": (4, 30, 512), "long": (60, 200, 128)}  # fewest and most words, number of texts


def texts(least: int, most: int, count: int) -> list[str]:
    words, draw = common.TEXT.read_text().split(), random.Random(0)
    lengths = [draw.randint(least, most) for _ in range(count)]
    starts = [draw.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def measure(path: Path, rounds: int) -> list[dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    theirs, ours = SentenceTransformer(str(path), device="cpu"), fj.load(path)
    programs = {
        "sentence_transformers": lambda given: theirs.encode(given, batch_size=32, normalize_embeddings=True),
        "ferrum_jax": ours.embed,
    }
    rows = []
    for kind, (least, most, count) in TEXTS.items():
        given = texts(least, most, count)
        vectors = {name: embed(given) for name, embed in programs.items()}  # compiles and warms up
        rates: dict[str, list[float]] = {name: [] for name in programs}
        others = 0.0
        for _ in range(rounds):
            for name, embed in programs.items():
                seconds, load, _ = common.sample(partial(embed, given))
                rates[name].append(count / seconds)
                others = max(others, load)
        error = float(np.abs(vectors["ferrum_jax"] - vectors["sentence_transformers"]).max())
        medians = {f"{name}_texts_s": common.summary(values, 1) for name, values in rates.items()}
        ratio = medians["ferrum_jax_texts_s"]["median"] / medians["sentence_transformers_texts_s"]["median"]
        check = {"error": error, "ok": error <= BOUND}
        rows.append({"texts": kind, "words": [least, most], **medians, "ratio": round(ratio, 3), "other_cores": others,
                     "content_check": check})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="what the model is called in the result")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rows = measure(options.model, options.rounds)
    common.write("embedding", {"model": options.name, "rows": rows}, "sentence-transformers", "torch", "transformers")


if __name__ == "__main__":
    main()
