"""Conversations of ten turns with a long beginning: how much of the first turn's time to the first token a later turn takes.

    python -m benchmarks.conversation MODEL.gguf --opening 8000

Made for models with layers that recur, whose state cannot be cut to a shorter text: a later turn goes on from the state at the
end of the answer before it. One conversation alone, then four that take turns. The prompt tokens that were computed are printed
next to the times, and every answer must be the one that an engine without a prefix cache gives.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np

import ferrum_jax as fj

LIMIT = 0.1  # of the first turn's time


class Turn(NamedTuple):
    """Seconds to the first token, prompt tokens, and those of them that were computed."""

    seconds: float
    prompt: int
    computed: int


def converse(engine: fj.Engine, texts: list[list[int]], turns: int, answer: int, question: list[int]) -> list[list[Turn]]:
    """The turns of conversations that take turns, given their beginnings, which grow to whole texts."""
    found: list[list[Turn]] = [[] for _ in texts]
    params = fj.SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    for _ in range(turns):
        for text, of_text in zip(texts, found, strict=True):
            before, begin = engine.metrics()["prompt_tokens"], time.perf_counter()
            request = engine.submit(text, params)
            outputs = iter(request)
            next(outputs)
            seconds = time.perf_counter() - begin
            for _ in outputs:
                pass
            of_text.append(Turn(seconds, len(text), int(engine.metrics()["prompt_tokens"] - before)))
            text += [*request.token_ids, *question]
    return found


def main() -> None:
    """Command line. Exit code 1 if a later turn took too long or an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--opening", type=int, default=8000, help="tokens of the beginning")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--question", type=int, default=32)
    parser.add_argument("--conversations", type=int, default=4)
    args = parser.parse_args()
    longest = args.opening + args.turns * (args.answer + args.question)
    model = fj.load(args.model, dtype=args.dtype, max_seq_len=-(-longest // 16) * 16)
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(3, min(model.tokenizer.vocab_size, model.config.vocab_size) - 300, count).tolist()

    question = ids(args.question)
    pages = args.conversations * -(-longest // 16) + 64
    config = fj.EngineConfig(num_pages=pages, max_seqs=4, checkpoints=4 * args.conversations)
    worst, right = 0.0, True
    for count in dict.fromkeys((1, args.conversations)):
        texts = [ids(args.opening) for _ in range(count)]
        with fj.Engine(model, config) as engine:
            converse(engine, [ids(args.opening)], 2, args.answer, question)  # compiles
            found = converse(engine, texts, args.turns, args.answer, question)
        print(f"{count} conversations in turn: seconds to the first token, and tokens computed of those of the prompt")
        for turn, row in enumerate(zip(*found, strict=True)):
            print(f"  turn {turn + 1:2}: " + ", ".join(f"{t.seconds:.3f} s {t.computed:,} of {t.prompt:,}" for t in row))
        share = max(t.seconds / turns[0].seconds for turns in found for t in turns[1:])
        print(f"  a later turn took up to {share:.1%} of the first")
        worst = max(worst, share)
        prompt = texts[0][: args.opening + (args.turns - 1) * (args.answer + args.question)]
        params = fj.SamplingParams(temperature=0.0, max_tokens=args.answer, ignore_eos=True)
        (alone,) = model.generate([prompt], params)
        right &= alone.token_ids == texts[0][len(prompt) :][: args.answer]
    print("the last answer is " + ("that of the text alone" if right else "NOT that of the text alone"))
    raise SystemExit(0 if right and worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
