"""Writes docs/performance.md and README's table of speeds, from benchmarks/results/*.json alone.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ferrum_jax.units import shown_dtype

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
FRONT = ROOT / "README.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks.report -->\n", "<!-- end of speed -->\n"
DISTURBED = 0.3  # cores used by other processes, above which no ratio between engines is shown

HEAD = """# Performance

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; do not edit it. Each table comes from
one run of the program named above it, and each speed comes with a check of the output in the same run. Numbers
are medians, with the smallest and largest sample. The [log](performance-log.md) has what was expected, and explains the
differences.
"""
CPU = """## CPU, against llama.cpp

`python -m benchmarks.cpu`. Both engines read the same file, get the same token ids of an English text, and alternate in
one run. Prefill is the time to the first token after {prompt_len} tokens; decode is the rate of the next {rest}.
**llama.cpp is the `xllamacpp` wheel, which is built for AVX2.** If a build for this machine was available, its own
programs ran in the same rounds, and a separate table shows them: prefill by `llama-bench`, decoding by
`llama-batched-bench` after prompts of the same length. With int8, this package's C++ kernels compute layers and output matrix.

Check: the timed tokens are compared with this package's float32, which the tests compare with transformers. "Equal" counts
the first tokens that equal float32's. At the first different one, "gap" is the distance of its float32 logit from the
best; "worst" is the largest such distance over all tokens, each after the tokens that the engine itself chose before it.
llama.cpp quantizes activations to int8. "Others" is the largest number of cores that other processes used during
a sample. Above {disturbed} the row is disturbed: its speeds are lower limits, and no ratio to llama.cpp is shown, because
llama.cpp's threads wait for each other by spinning and lose far more than ours if other processes run.
"""
COMPILE = """## Compilation

`python -m benchmarks.compile_time`. `functional.generate` (prefill, sampling and loop in one program) for a Qwen3-MoE of
hidden size 256 and 16 experts, of which only the shapes exist; the persistent cache is off. Check: the program aliases the
whole KV cache.
"""
STARTS = """## First and second start

The same program. From starting a process to its first token ({model}), first with an empty compilation cache and then with
the cache of that start, compared with a process that only imports jax and runs `x + 1`. {check}
"""
MEMORY = """## Memory

`python -m benchmarks.memory`. Peak resident memory (VmHWM, mapped pages included) of a process that loads a file and
generates 64 tokens after 16; the limit is the parameters + 1.5 GiB. The files have random weights in the shapes of the
models. "Weights read" counts the experts of a token and all other matrices. llama.cpp: a build for this machine, its
llama-bench alternating with the processes of this package. Check: log-probabilities are finite and each token is the likeliest.
"""
CHECKPOINTS = """## Loading and quantizing

`python -m benchmarks.checkpoints`. A GGUF file of {size} GiB, and the Orbax checkpoint converted from it, read from the page
cache to arrays, alternating with a plain read into fresh memory; the best of each: {read:.2f} GB/s plain, {gguf:.2f} times
that for GGUF and {orbax:.2f} times for Orbax. {equal}

Quantizing float32 weights on all cores; check: the RMS error, for numbers of a normal distribution.
"""
DTYPES = """## Cost of dtypes

`python -m benchmarks.dtypes`. Perplexity of an English text in windows of {window} tokens, on CPU. Check: float32 against
transformers on the exactly dequantized weights.
"""
EMBEDDING = """## Embeddings

`python -m benchmarks.embedding`. {name} in float32; texts with the given number of words, cut from an English text, all at
once; alternating with sentence-transformers {theirs} (torch {torch}) on the same directory. Check: the largest difference of
the vectors.
"""
ENGINE = """## The engine

`python -m benchmarks.engine`. {name}, {threads} threads; {requests} requests that arrive together, with prompts and outputs of
mixed lengths, {prompt_tokens:,} and {output_tokens:,} tokens in total, generated greedily: one after the other, with {slots}
slots of the engine, and with as many of llama.cpp's server, alternating. "x one by one" compares medians of the same dtype.
Times to the first token count from the arrival of all requests; the table has the median and the worst of the
requests.

Check: "equal" counts the requests whose tokens all equal those of float32 `generate`, called for each alone; "worst" is the
largest distance of a token's float32 logit from the best one, each after the tokens before it.
"""
ENGINE_HOST = """### The host's part of a step

Decode steps with the given number of rows, one in each dispatch or as many as the engine chooses. The host schedules,
launches and processes results while the device computes, here on the same cores and with the same caches; a small synthetic
model leaves most of them to the host. "CPU" is the time of the host's thread in a step, by stage.
"""
ENGINE_PREFIX = """### A repeated prompt

Time to the first token of a prompt of {prompt_len:,} tokens: first {first} s, repeated {repeated} s, {share:.1f} % of it,
with {saved_tokens:,} tokens found in the prefix cache. Others: {other_cores:.2f}. {check}
"""
ENGINE_SPECULATION = """### Speculation

Decoding with drafts from the sequence's own text (`speculation={count}`) and without. Repetitive: a paragraph,
the same again, and its beginning, continued greedily; other: English at temperature 1. Check: the tokens with and without.
"""
ENGINE_KV = """### Cost of KV dtypes

Perplexity of an English text in windows of {window} tokens, in float32, teacher-forced in decode steps with one token in each
row, so that every key and value is read back from its page. Check: float32 against prefill, {prefill:.5f}
({difference:+.5f} %). {scored:,} tokens are scored.
"""
GPU = """## {device}

`python -m benchmarks.gpu`. Qwen3-30B-A3B's shapes, random Q4_K_M weights that were generated on the device; decoding starts
at {context} tokens of context, with {steps} tokens in a dispatch. A share is the rate of the bytes that a kernel must read,
divided by that of a device-to-device copy in the same run. {checks} checks of kernels, attention and logits against float64
or float32 were made in that run; {wrong}.
"""
PEERS = """### Other engines on it

`python -m benchmarks.gpu_peers`. The same shapes; transformers in bfloat16, which reads 3.6 times the bytes.
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(figure: dict[str, float], digits: int = 1) -> str:
    """Median (smallest to largest)."""
    median, low, high = (f"{figure[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def measured_on(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", " ".join(machine["instructions"])]
    return f"Measured on: {', '.join(parts)}. " + ", ".join(f"{name} {is_}" for name, is_ in versions.items()) + ".\n"


def native(result: dict[str, Any]) -> str:
    """The table of llama.cpp's native build, with int8 relative to it."""
    ours = {row["batch"]: row for row in result["rows"] if (row["engine"], row["dtype"]) == ("ferrum_jax", "int8")}
    rows = []
    for row in result["native"]:
        line = [str(row["batch"])]
        for key in ("prefill_tok_s", "decode_tok_s"):
            rate = row.get(key)
            mine = ours[row["batch"]][key]["median"]
            line += [spread(rate), f"{mine / rate['median']:.2f}"] if rate else ["-", "-"]
        rows.append(line)
    columns = ["batch", "llama.cpp, native build: prefill tok/s", "int8, x that", "decode tok/s", "int8, x that"]
    return table(columns, rows)


def cpu(results: list[dict[str, Any]]) -> list[str]:
    first = results[0]
    parts = [CPU.format(prompt_len=first["prompt_len"], rest=first["gen_len"] - 1, disturbed=DISTURBED), measured_on(first)]
    for result in results:
        model, peer = result["model"], next((row for row in result["rows"] if row["engine"] == "llama.cpp"), None)
        formats = sorted(model["formats"], key=lambda name: -model["formats"][name])
        shown = ", ".join(name for name in formats if name != "F32")
        parts.append(
            f"### {model['name']}\n\n{model['architecture']}, {model['parameter_bytes'] / 1e6:.0f} MB in {shown}; "
            f"{result['threads']} threads; llama.cpp's build: {result['llama_cpp_build'] or 'not installed'}.\n"
        )
        rows = []
        for row in result["rows"]:
            check = row["content_check"]
            quiet = peer and max(row["other_cores"], peer["other_cores"]) <= DISTURBED
            ratios = [
                f"{row[key]['median'] / peer[key]['median']:.2f}" if quiet else "disturbed" if peer else "-"
                for key in ("prefill_tok_s", "decode_tok_s")
            ]
            gap = check["gap_at_parting"]
            rows.append(
                [
                    f"{row['engine']}, {row['dtype']}",
                    str(row["batch"]),
                    spread(row["prefill_tok_s"], 0),
                    ratios[0],
                    spread(row["decode_tok_s"]),
                    ratios[1],
                    f"{check['equal_tokens']} of {check['tokens']}",
                    "-" if gap is None else f"{gap:.3f}",
                    f"{check['worst_gap']:.3f}",
                    f"{row['other_cores']:.2f}",
                ]
            )
        columns = [
            "",
            "batch",
            "prefill tok/s",
            "x llama.cpp",
            "decode tok/s",
            "x llama.cpp",
            "equal",
            "gap",
            "worst",
            "others",
        ]
        parts.append(table(columns, rows))
        if result.get("native"):
            parts.append(native(result))
    return parts


def compile_time(results: list[dict[str, Any]]) -> list[str]:
    [result] = results
    base = result["programs"][0]["compile_s"]["median"]
    rows = [
        [
            program["program"],
            str(program["bodies"]),
            spread(program["tracing_s"], 2),
            spread(program["xla_s"], 2),
            spread(program["compile_s"], 2),
            f"{program['compile_s']['median'] / base:.2f}",
            f"{program['alias_bytes']:,} of {program['cache_bytes']:,}",
            f"{program['other_cores']:.2f}",
        ]
        for program in result["programs"]
    ]
    columns = ["program", "layer bodies", "tracing, s", "XLA, s", "both, s", "x", "cache bytes aliased", "others"]
    check = result["starts"]["content_check"]
    equal = f"Check: the first {check['tokens']} tokens are the same in every start" if check["equal"] else "CHECK FAILED"
    starts = []
    for row in result["starts"]["rows"]:
        inner = [spread(row[key], 2) if key in row else "-" for key in ("load_s", "compile_s")]
        name = "jax alone" if row["start"] == "empty" else row["start"]
        starts.append([name, spread(row["first_token_s"], 2), *inner])
    return [
        COMPILE,
        measured_on(result),
        table(columns, rows),
        STARTS.format(model=result["model"], check=equal + "."),
        table(["start", "to the first token, s", "loading, s", "compilation, s"], starts),
    ]


def memory(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in sorted(results, key=lambda result: result["parameter_bytes"]):
        check = result["content_check"]
        good = check["logprobs_finite"] and check["greedy"]
        rows.append(
            [
                result["name"],
                result["dtype"],
                gib(result["parameter_bytes"]),
                gib(result["peak_imported_bytes"]),
                gib(result["peak_loaded_bytes"]),
                gib(result["peak_generated_bytes"]),
                gib(result["limit_bytes"]),
                f"{result['load_s']:.1f}",
                f"{result['compile_s']:.1f}",
                f"{result['decode_tok_s']['median']:.2f}",
                f"{result['read_gb_s']:.1f}",
                f"{result['llama_cpp_decode_tok_s']['median']:.2f}" if "llama_cpp_decode_tok_s" in result else "",
                f"{check['tokens']} tokens, {check['distinct_tokens']} distinct" if good else "FAILED",
            ]
        )
    columns = ["file", "dtype", "parameters, GiB", "peak after import", "after loading", "after generating", "limit"]
    columns += ["loading, s", "compilation, s", "decode tok/s", "weights read, GB/s", "llama.cpp, tok/s", "check"]
    return [MEMORY, measured_on(results[0]), table(columns, rows)]


def checkpoints(results: list[dict[str, Any]]) -> list[str]:
    [result] = results
    load = result["loading"]
    head = CHECKPOINTS.format(
        size=gib(result["bytes"]),
        read=load["plain_read_gb_s"],
        gguf=load["gguf_ratio"],
        orbax=load["orbax_ratio"],
        equal="Check: both give the same parameters." if load["content_check"]["equal"] else "CHECK FAILED.",
    )
    rows = [
        [row["format"], f"{row['weights_per_s'] / 1e6:,.0f}", f"{row['content_check']['rms_error']:.4f}"]
        for row in result["quantizing"]
    ]
    return [head, measured_on(result), table(["format", "million weights/s", "RMS error"], rows)]


def dtypes(results: list[dict[str, Any]]) -> list[str]:
    [result] = results
    rows = []
    for model in result["models"]:
        check = model["content_check"]
        for row in model["rows"]:
            exact = row["dtype"] == "float32" and check["transformers"] is not None
            shown = f"{check['transformers']:.5f} ({check['float32_difference_percent']:+.5f} %)" if exact else "-"
            change = f"{row['change_percent']:+.4f} %"
            rows.append(
                [model["model"], row["dtype"], f"{row['perplexity']:.5f}", change, shown, f"{model['scored_tokens']:,}"]
            )
    columns = ["model", "dtype", "perplexity", "against float32", "transformers", "scored tokens"]
    return [DTYPES.format(window=result["window"]), measured_on(result), table(columns, rows)]


def embedding(results: list[dict[str, Any]]) -> list[str]:
    [result] = results
    rows = []
    for row in result["rows"]:
        rates = [f"{row[f'{name}_texts_s']['median']:,.0f}" for name in ("ferrum_jax", "sentence_transformers")]
        check = row["content_check"]
        held = f"{check['error']:.1e}{'' if check['ok'] else ', FAILED'}"
        rows.append([row["texts"], "{} to {}".format(*row["words"]), *rates, f"{row['ratio']:.2f}", held])
    columns = ["texts", "words", "ferrum_jax, texts/s", "sentence-transformers", "ratio", "check"]
    versions = result["versions"]
    head = EMBEDDING.format(
        name=result["model"], theirs=versions["sentence-transformers"], torch=versions["torch"].partition("+")[0]
    )
    return [head, measured_on(result), table(columns, rows)]


def engine(results: list[dict[str, Any]]) -> list[str]:
    [result] = results
    load, prefix, kv = result["throughput"], result["prefix_cache"], result["kv_dtypes"]
    slots = max(row["slots"] for row in load["rows"])
    facts = {"name": result["model"]["name"], "threads": result["threads"], "slots": slots}
    parts = [ENGINE.format(**load, **facts), measured_on(result)]
    rows = []
    for row in load["rows"]:
        check, times = row["content_check"], row["times_one_by_one"]
        rows.append(
            [
                f"{row['engine']}, {row['dtype']}",
                "one by one" if row["slots"] == 1 else str(row["slots"]),
                spread(row["output_tok_s"]),
                "-" if times is None else f"{times:.2f}",
                spread(row["seconds"]),
                spread(row["first_token_s"]),
                spread(row["worst_first_token_s"]),
                f"{check['equal_requests']} of {check['requests']}",
                f"{check['worst_gap']:.3f}",
                f"{row['other_cores']:.2f}",
            ]
        )
    columns = ["", "slots", "tok/s", "x one by one", "seconds", "first token, s", "worst first token, s"]
    parts.append(table([*columns, "equal", "worst", "others"], rows))
    hosts = []
    for row in result["host"]:
        stages = ", ".join(f"{name} {cpu:,}" for name, (_, cpu) in row["stages_us"].items())
        head = [
            row["model"],
            row["dtype"],
            str(row["rows"]),
            f"{row['steps_a_dispatch']:g}",
            spread(row["step_ms"]),
            spread(row["host_us"], 0),
        ]
        hosts.append([*head, f"{row['share_percent']:.2f} %", stages, f"{row['other_cores']:.2f}"])
    columns = ["", "", "rows", "steps a dispatch", "step, ms", "host, us", "of the step", "CPU, us", "others"]
    parts += [ENGINE_HOST, table(columns, hosts)]
    equal = "Check: the same tokens." if prefix["content_check"]["equal"] else "CHECK FAILED."
    figures = {"first": spread(prefix["first_s"], 3), "repeated": spread(prefix["repeated_s"], 3), "check": equal}
    parts.append(ENGINE_PREFIX.format(**prefix, **figures, share=100 * prefix["repeated_of_first"]))
    drafts = [
        [
            row["dtype"],
            row["text"],
            str(row["rows"]),
            spread(row["without_s"], 2),
            spread(row["with_s"], 2),
            f"{row['faster']:.2f}",
            "equal" if row["content_check"]["equal"] else "FAILED",
            f"{row['other_cores']:.2f}",
        ]
        for row in result["speculation"]["rows"]
    ]
    columns = ["", "text", "rows", "without, s", "with, s", "x", "check", "others"]
    parts += [ENGINE_SPECULATION.format(count=result["speculation"]["drafted"]), table(columns, drafts)]
    check = kv["content_check"]
    said = {"prefill": check["float32_prefill"], "difference": check["difference_percent"], "scored": kv["scored_tokens"]}
    costs = [
        [
            shown_dtype(row["dtype"]),
            f"{row['bytes_per_token']:,g}",
            f"{row['perplexity']:.5f}",
            f"{row['change_percent']:+.4f} %",
        ]
        for row in kv["rows"]
    ]
    columns = ["KV dtype", "bytes a token", "perplexity", "against float32"]
    return [*parts, ENGINE_KV.format(window=kv["window"], **said), table(columns, costs)]


def gpu(results: list[dict[str, Any]]) -> list[str]:
    parts: list[str] = []
    for result in (one for one in results if one["benchmark"] == "gpu"):
        device = result["device"]["name"]
        peers = [one for one in results if one["benchmark"] == "gpu-peers" and one["device"]["name"] == device]
        rows = [row for section in result["sections"].values() for row in section["rows"]]
        decode = next((row for row in rows if "context" in row), {"context": "-"})
        checked = [row for row in rows if "ok" in row.get("check", row)]
        wrong = [row["name"] for row in checked if not row.get("check", row)["ok"]]
        failed = [f"{one['step']} ({one['error']})" for part in result["sections"].values() for one in part["failures"]]
        bad = {"wrong": wrong, "failed": failed}
        said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in bad.items() if names) or "all held"
        facts = {"device": device, "context": decode["context"], "steps": result["steps"]}
        parts += [GPU.format(checks=len(checked), wrong=said, **facts), measured_on(result)]
        figures = [row for row in rows if "value" in row]
        columns = ["", "measured", "", "floor", "must", "aim", "check"]
        parts.append(table(columns, [gpu_figure(row) for row in sorted(figures, key=lambda row: "must" not in row)]))
        profiles = [[row["name"].removeprefix("profile of "), *gpu_profile(row)] for row in rows if row.get("launches")]
        parts.append(table(["a step of", "launches", "in kernels, ms", "idle, ms", "most of it"], profiles))
        for peer in peers:
            lines = [[row["name"], f"{row['value']:,.1f}" if "value" in row else row["not_measured"]] for row in peer["rows"]]
            parts += [PEERS, table(["", "tokens/s"], lines)]
    return parts


def gpu_figure(row: dict[str, Any]) -> list[str]:
    goals = ["-" if row.get(name) is None else f"{row[name]:,g}" for name in ("floor", "must", "aim")]
    check = row.get("check", {}).get("ok")
    return [row["name"], f"{row['value']:,.4g}", row["unit"], *goals, {True: "held", False: "FAILED", None: "-"}[check]]


def gpu_profile(row: dict[str, Any]) -> list[str]:
    top = ", ".join(f"{kernel['kernel']} {kernel['ms']:.3f} ms" for kernel in row["top"][:4])
    return [f"{row['launches']:,g}", f"{row['kernel_ms']:.3f}", f"{row['idle_ms']:.3f}", top]


SECTIONS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "cpu-": cpu,
    "engine": engine,
    "compile_time": compile_time,
    "memory-": memory,
    "checkpoints": checkpoints,
    "dtypes": dtypes,
    "embedding": embedding,
    "gpu-": gpu,
}


def render(folder: Path = RESULTS) -> str:
    """The page; a section without results is left out."""
    parts = [HEAD]
    for prefix, section in SECTIONS.items():
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}*.json"))]
        if results:
            parts += section(results)
    return "\n".join(parts)


def front(folder: Path = RESULTS) -> str:
    """README's table: int8 on a CPU, and llama.cpp's build for the same machine."""
    paths = [path for prefix in ("cpu-", "memory-") for path in sorted(folder.glob(f"{prefix}*.json"))]
    results = [json.loads(path.read_text()) for path in paths]
    machine = results[0]["machine"]
    if any(result["machine"] != machine for result in results):
        raise ValueError("the results come from several machines; README's table names one")
    rows = []
    for result in sorted(results, key=lambda result: result.get("model", result)["parameter_bytes"]):
        model = result.get("model", result)
        if "rows" in result:
            ours = {row["batch"]: row for row in result["rows"] if (row["engine"], row["dtype"]) == ("ferrum_jax", "int8")}
            theirs = {row["batch"]: row for row in result.get("native", [])}
        else:
            ours = {1: {"decode_tok_s": result["decode_tok_s"]}}
            theirs = {1: {"decode_tok_s": result["llama_cpp_decode_tok_s"]}}
        cells = []
        for batch, key in ((1, "prefill_tok_s"), (1, "decode_tok_s"), (16, "decode_tok_s")):
            pair = [side.get(batch, {}).get(key) for side in (ours, theirs)]
            shown = [f"{rate['median']:,.{0 if rate['median'] >= 100 else 1}f}" if rate else "-" for rate in pair]
            cells.append(shown[0] if shown[1] == "-" else f"**{shown[0]}** / {shown[1]}")
        rows.append([f"{model['name']}, {model['parameter_bytes'] / 1e6:,.0f} MB", *cells])
    named = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {' '.join(machine['instructions'])}"
    columns = ["tokens a second, ferrum_jax / llama.cpp", "prompt", "one sequence", "16 sequences"]
    return f"On one machine: {named}.\n\n" + table(columns, rows)


def with_front(text: str) -> str:
    """README with a new table of speeds."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{front()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(render())
    FRONT.write_text(with_front(FRONT.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)} and the table of {FRONT.relative_to(ROOT)}")
