"""Prefill and decode on a CPU against llama.cpp: same file, same token ids, interleaved in one run.

    python -m benchmarks.cpu                       # SmolLM2-135M
    python -m benchmarks.cpu MODEL.gguf --name qwen2.5-coder-0.5b
    python -m benchmarks.cpu --synthetic qwen3-moe-600m

For every engine the same clock around the same requests: one token after the prompt is prefill; what `--generate` tokens
take beyond that is decoding. The tokens that were timed are then checked against this package's float32, teacher-forced.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ferrum_jax as fj
from benchmarks import common, make_synthetic
from benchmarks.llama_cpp import LlamaCpp
from ferrum_jax import hub

DTYPES = ("float32", "bfloat16", "int8")
Run = Callable[[list[list[int]], int], list[list[int]]]


def ours(model: Any) -> Run:
    def run(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = fj.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return [completion.token_ids for completion in model.generate(prompts, params)]

    return run


def make_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Runs of English of `length` tokens, from places spread over the text."""
    ids = tokenizer.encode(common.TEXT.read_text())
    ids = ids * -(-2 * length // len(ids))
    step = (len(ids) - length) // count
    return [ids[step * i : step * i + length] for i in range(count)]


def check(exact: Any, prompt: list[int], tokens: list[int], reference: list[int]) -> dict[str, Any]:
    """How `tokens`, generated after `prompt`, stand with float32.

    equal_tokens: how many at the start are float32's own; gap_at_parting: how far, in float32's logits, the first other
    token lies below the best one; worst_gap: the same over all tokens, each after the ones before it.
    """
    [logits] = exact.logits([[*prompt, *tokens[:-1]]])
    rows = logits[len(prompt) - 1 :, : exact.tokenizer.vocab_size]
    if not np.isfinite(rows).all():
        raise RuntimeError("content check: float32 logits are not finite")
    gaps = rows.max(-1) - rows[np.arange(len(tokens)), tokens]
    equal = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b), len(tokens))
    parting = round(float(gaps[equal]), 4) if equal < len(tokens) else None
    found = {"tokens": len(tokens), "equal_tokens": equal, "gap_at_parting": parting}
    return found | {"worst_gap": round(float(gaps.max()), 4)}


def measure(path: Path, name: str, *, rounds: int, prompt_len: int, gen_len: int, batch: int) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    models = {dtype: fj.load(path, dtype=dtype) for dtype in DTYPES}
    exact = models["float32"]
    prompts = make_prompts(exact.tokenizer, batch, prompt_len)
    with LlamaCpp(path, threads=threads, context=prompt_len + gen_len + 16) as peer:
        cases: list[tuple[str, str, int, Run]] = [("llama.cpp", "int8 blocks", 1, lambda p, n: [peer.generate(p[0], n)])]
        cases += [("ferrum_jax", dtype, rows, ours(models[dtype])) for rows in (1, batch) for dtype in DTYPES]
        times: dict[tuple, list[tuple[float, float]]] = {case: [] for case in cases}
        answers: dict[tuple, list[list[int]]] = {}
        loads: dict[tuple, list[float]] = {case: [] for case in cases}
        for engine, _, count, run in cases:
            for tokens in (1, gen_len) if engine == "ferrum_jax" else (1,):  # compiles
                run(prompts[:count], tokens)
        for number in range(rounds):
            for case in cases:
                run, asked = case[3], prompts[: case[2]]
                first, others, _ = common.sample(partial(run, asked, 1), [peer.pid])
                whole, more, answer = common.sample(partial(run, asked, gen_len), [peer.pid])
                times[case].append((first, whole - first))
                loads[case].extend((others, more))
                answers[case] = answer
                taken = f"{first:.3f} s + {whole - first:.3f} s, others {others}, {more}"
                print(f"round {number + 1}: {' '.join(map(str, case[:3]))}: {taken}", flush=True)
        build = peer.build
    reference = answers[cases[1]][0]
    rows = []
    for case in cases:
        engine, dtype, count, _ = case
        row = {
            "engine": engine,
            "dtype": dtype,
            "batch": count,
            "prefill_tok_s": common.summary([count * prompt_len / first for first, _ in times[case]], 2),
            "decode_tok_s": common.summary([count * (gen_len - 1) / rest for _, rest in times[case]], 2),
            "other_cores": max(loads[case]),
            "content_check": check(exact, prompts[0], answers[case][0], reference),
        }
        rows.append(row)
    return {
        "model": {
            "name": name,
            "architecture": exact.config.architecture,
            "parameter_bytes": exact.memory()["parameters_total"],
            "formats": exact.memory()["parameters"],
        },
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "threads": threads,
        "llama_cpp_build": build,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2:135m", help="a path, or anything that `load` takes")
    parser.add_argument("--name", help="what the result is called; default: the model")
    parser.add_argument("--synthetic", choices=make_synthetic.SHAPES, help="make this model and measure it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to spend on waiting for a quiet machine")
    options = parser.parse_args()
    common.Patience.left = options.patience
    with tempfile.TemporaryDirectory() as folder:
        if options.synthetic:
            path = Path(folder) / f"{options.synthetic}.gguf"
            make_synthetic.make(path, options.synthetic)
        else:
            path = hub.resolve(options.model)
        name = options.name or options.synthetic or options.model.replace(":", "-")
        sizes = {"prompt_len": options.prompt_len, "gen_len": options.generate, "batch": options.batch}
        result = measure(path, name, rounds=options.rounds, **sizes)
    common.write(f"cpu-{name}", result, "xllamacpp")


if __name__ == "__main__":
    main()
