"""`ferrum-jax bench`: the speed of prefill and decode, with a check of the generated tokens in the same run.

A generation of one token is the prefill; one of `gen_len` tokens adds `gen_len - 1` decode steps. Both are timed at the
same shapes after a warm-up, so the difference is decoding, and neither includes compilation.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import click

import ferrum_jax as fj
from ferrum_jax.cli import common
from ferrum_jax.cli.output import print_table

REPEATS = 3
CHECKED_TOKENS = 8
PROMPT_LENGTHS, GENERATED = (64, 512), 64


def make_prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of random ids. The first depends on `length` alone, so that batches can be compared."""
    import numpy as np

    return [np.random.default_rng([row, length]).integers(0, vocab_size, length).tolist() for row in range(batch)]


def _lengths(prompts: tuple[int, ...] | None, generated: int | None, context: int) -> tuple[tuple[int, ...], int]:
    """The lengths to measure: as given, otherwise the defaults as far as they fit the context."""
    if generated is None:
        generated = max(2, min(GENERATED, context - max(prompts) if prompts else context // 4))
    return prompts or tuple(dict.fromkeys(max(1, min(n, context - generated)) for n in PROMPT_LENGTHS)), generated


def _greedy(tokens: int) -> Any:
    return fj.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def measure(model: Any, batch: int, prompt_len: int, gen_len: int) -> tuple[dict[str, Any], list[int]]:
    """One row of the table (medians of three), and the tokens generated for the first prompt."""
    prompts = make_prompts(model.tokenizer.vocab_size, batch, prompt_len)

    def seconds(tokens: int) -> tuple[float, list[int]]:
        model.generate(prompts, _greedy(tokens))  # warm-up: compiles
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            done = model.generate(prompts, _greedy(tokens))
            taken.append(time.perf_counter() - start)
        if error := next((completion.error for completion in done if completion.error), ""):
            raise fj.NotFiniteError(error)
        if any(len(completion.token_ids) != tokens for completion in done):
            raise RuntimeError(f"a completion does not have the requested {tokens} tokens")
        return statistics.median(taken), list(done[0].token_ids)

    first, _ = seconds(1)
    whole, generated = seconds(gen_len)
    row = {
        "batch": batch,
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "prefill_tok_s": common.rate(batch * prompt_len, first),
        "decode_tok_s": common.rate(batch * (gen_len - 1), whole - first),
        "ttft_s": round(first, 4),
    }
    return row, generated


def check_content(exact: Any, prompt: list[int], answers: dict[int, list[int]]) -> dict[str, Any]:
    """Compares generated tokens with the float32 model `exact`, teacher-forced.

    `answers`: batch size -> the first tokens generated for `prompt` in that batch. The gap of a token is the distance of its
    float32 logit from the best one; 0 for all tokens means that they are float32's greedy tokens.
    """
    import numpy as np

    gaps: list[float] = []
    equal = True
    for tokens in {tuple(tokens[:CHECKED_TOKENS]) for tokens in answers.values()}:
        [logits] = exact.logits([[*prompt, *tokens[:-1]]])
        rows = np.asarray(logits[len(prompt) - 1 :, : exact.tokenizer.vocab_size], np.float32)
        if not np.isfinite(rows).all():
            raise RuntimeError("content check: float32 logits are not finite")
        equal &= rows.argmax(-1).tolist() == list(tokens)
        gaps.extend((rows.max(-1) - rows[np.arange(len(tokens)), list(tokens)]).tolist())
    return {
        "tokens": min(CHECKED_TOKENS, *(len(tokens) for tokens in answers.values())),
        "prompt_len": len(prompt),
        "batches": sorted(answers),
        "equal": bool(equal),
        "max_gap": max(gaps),
    }


def _print_table(result: dict[str, Any]) -> None:
    columns = ("batch", "prompt_len", "gen_len", "prefill_tok_s", "decode_tok_s", "ttft_s")
    rows = []
    for row in result["rows"]:
        speeds = (common.figure(row["prefill_tok_s"]), common.figure(row["decode_tok_s"]))
        rows.append((*(str(row[key]) for key in columns[:3]), *speeds, common.figure(row["ttft_s"], 4)))
    forced = [f"{operation} by {backend}" for operation, backend in result.get("implementation", {}).items()]
    click.echo("  ".join([result["model"], result["dtype"], result["device"], *forced]))
    click.echo(", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "\n")
    print_table(rows, columns, columns)
    click.echo(f"\nload {result['load_s']:.2f} s, compile {result['compile_s']:.2f} s")
    second = result["second_start"]
    if second:
        figures = f"load {second['load_s']:.2f} s, compile {second['compile_s']:.2f} s"
        click.echo(f"second start, compilation cache warm: {figures}")
    click.echo(f"peak memory {common.readable_bytes(result['peak_rss_bytes'])}")
    click.echo(_verdict(result["content_check"]))


def _verdict(check: dict[str, Any]) -> str:
    if check["equal"]:
        return f"content check: the first {check['tokens']} greedy tokens equal float32's"
    return (
        f"content check: the first {check['tokens']} greedy tokens differ from float32's; teacher-forced, they lie "
        f"at most {check['max_gap']:.4f} below float32's best logit"
    )


def second_start(arguments: list[str]) -> dict[str, float] | None:
    """`load_s` and `compile_s` of a new process that runs the same shapes once. If it fails, prints a note and returns None."""
    command = [sys.executable, "-m", "ferrum_jax", "bench", *arguments, "--once"]
    child = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if child.returncode == 0:
        return json.loads(child.stdout)
    reason = " ".join((child.stderr.strip().splitlines() or ["no message"])[-1].split())
    click.echo(f"note: the second start failed with exit code {child.returncode}: {reason}", err=True)
    return None


def _peak_rss_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def _startup(model: Any) -> dict[str, float]:
    timings = model.timings()
    return {"load_s": round(timings["load_s"], 3), "compile_s": round(timings["compile_s"], 3)}


@click.command("bench", short_help="Measure prefill and decode speed.")
@common.optional_model_argument
@click.option("--batch", type=common.PositiveIntegers(), default="1,4", show_default=True)
@click.option(
    "--prompt-len",
    type=common.PositiveIntegers(),
    help="Tokens of each prompt. Default: 64,512, or less if the context is shorter.",
)
@click.option(
    "--gen-len", type=click.IntRange(min=2), help="Tokens to generate. Default: 64, or less if the context is shorter."
)
@common.dtype_option
@common.implementation_option
@common.mesh_option
@click.option(
    "--second-start/--no-second-start", "again", default=True, show_default=True,
    help="Also time a second process, which finds the compiled programs.",
)  # fmt: skip
@click.option("--once", is_flag=True, hidden=True, help="Run each shape once and print load and compile times.")
@common.json_option
def bench_command(
    model: str,
    batch: tuple[int, ...],
    prompt_len: tuple[int, ...] | None,
    gen_len: int | None,
    dtype: str,
    implementation: dict[str, str] | None,
    mesh: str | None,
    again: bool,
    once: bool,
    as_json: bool,
) -> None:
    """Measure the speed of MODEL on random prompts: medians of three, greedy, without compilation, output checked.

    --batch and --prompt-len take lists such as 1,4; every pair is measured.
    """
    loaded = common.load_model(model, dtype=dtype, implementation=implementation, mesh=mesh)
    context = loaded.max_seq_len
    prompt_len, gen_len = _lengths(prompt_len, gen_len, context)
    if max(prompt_len) + gen_len > context:
        raise click.UsageError(
            f"--prompt-len {max(prompt_len)} plus --gen-len {gen_len} is longer than the context of {context} tokens"
        )
    shapes = [(rows, length) for length in prompt_len for rows in batch]
    if once:
        for rows, length in shapes:
            for tokens in (1, gen_len):
                loaded.generate(make_prompts(loaded.tokenizer.vocab_size, rows, length), _greedy(tokens))
        common.print_json(_startup(loaded))
        return

    table, answers = [], {}
    for number, (rows, length) in enumerate(shapes, 1):
        if sys.stderr.isatty():
            click.echo(f"{number} of {len(shapes)}: batch {rows}, prompt {length}", err=True)
        row, generated = measure(loaded, rows, length, gen_len)
        table.append(row)
        if length == min(prompt_len):
            answers[rows] = generated
    result = {
        "model": model,
        "device": common.device_name(),
        "dtype": loaded.config.dtype,
        **({"implementation": implementation} if implementation else {}),
        **({"mesh": mesh} if mesh else {}),
        "versions": common.versions(),
        "rows": table,
        **_startup(loaded),
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    [prompt] = make_prompts(loaded.tokenizer.vocab_size, 1, min(prompt_len))
    if loaded.config.dtype != "float32" or implementation or mesh:
        del loaded
        gc.collect()
        loaded = common.load_model(model, dtype="float32")
    result["content_check"] = check_content(loaded, prompt, answers)
    del loaded
    gc.collect()
    numbers = ["--batch", ",".join(map(str, batch)), "--prompt-len", ",".join(map(str, prompt_len))]
    arguments = [model, *numbers, "--gen-len", str(gen_len), "--dtype", dtype]
    for pair in (implementation or {}).items():
        arguments += ["--implementation", "=".join(pair)]
    arguments += ["--mesh", mesh] if mesh else []
    result["second_start"] = second_start(arguments) if again else None
    if as_json:
        common.print_json(result)
    else:
        _print_table(result)
