"""Peak memory and speed of loading a file and generating 64 tokens from it, in a separate process.

    python -m benchmarks.memory MODEL.gguf --name qwen3-30b-a3b
    python -m benchmarks.memory MODEL.gguf --name qwen3-30b-a3b --llama-bench BUILD/bin/llama-bench   # alternating with it

The peak is the kernel's VmHWM, mapped pages included. It should stay below the parameters' bytes + 1.5 GiB. Decoding is
compared with the time it takes to read the weights of a token (of the experts, as many as a token is expected to choose).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import common

LIMIT_ABOVE_PARAMETERS = 3 << 29  # bytes: 1.5 GiB
PROMPT, TOKENS = 16, 64


def peak_bytes() -> int:
    """VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(path: str, dtype: str) -> dict[str, Any]:
    """Loads, generates and returns the measurements; runs in the measured process."""
    import jax

    import ferrum_jax as fj
    from ferrum_jax import plan

    jax.devices()
    imported = peak_bytes()
    begin = time.perf_counter()
    model = fj.load(path, dtype=dtype)
    load_s = time.perf_counter() - begin
    loaded = peak_bytes()
    prompt = model.tokenizer.encode(common.TEXT.read_text()[:1000])[:PROMPT]

    def generate(tokens: int) -> tuple[float, Any]:
        params = fj.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=1)
        model.generate([prompt], params)  # compiles
        start = time.perf_counter()
        [completion] = model.generate([prompt], params)
        return time.perf_counter() - start, completion

    first, _ = generate(1)
    whole, completion = generate(TOKENS)
    share, _ = plan.experts_read(model.config, 1)
    values = [value for token in completion.logprobs for _, value in token]
    greedy = all(chosen[0] == best[0] for chosen, best in completion.logprobs)
    return {
        "parameter_bytes": model.memory()["parameters_total"],
        "formats": model.memory()["parameters"],
        "read_bytes_per_token": plan.weights_read(model.params, model.config, 1, share),
        "architecture": model.config.architecture,
        "layers": model.config.num_layers,
        "dtype": str(model.config.dtype),
        "peak_imported_bytes": imported,
        "peak_loaded_bytes": loaded,
        "peak_generated_bytes": peak_bytes(),
        "load_s": round(load_s, 2),
        "compile_s": round(model.timings()["compile_s"], 2),
        "prefill_s": round(first, 3),
        "decode_tok_s": round((TOKENS - 1) / (whole - first), 3),
        "content_check": {
            "tokens": len(completion.token_ids),
            "distinct_tokens": len(set(completion.token_ids)),
            "logprobs_finite": all(map(math.isfinite, values)),
            "greedy": greedy,
        },
    }


def output(command: list[str]) -> str:
    common.wait_for_quiet()
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True, help="what the result is called")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--llama-bench", type=Path, help="a build of llama.cpp to compare with")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(str(options.model), options.dtype)))
        return
    command = [sys.executable, "-m", "benchmarks.memory", str(options.model), "--name", options.name, "--child"]
    command += ["--dtype", options.dtype]
    results, peers = [], []
    for _ in range(options.rounds):
        results.append(json.loads(output(command)))
        if options.llama_bench:
            sizes = ["-p", "0", "-n", str(TOKENS), "-r", "1", "-t", str(os.cpu_count()), "-o", "json"]
            [row] = json.loads(output([str(options.llama_bench), "-m", str(options.model), *sizes]))
            peers.append(row["avg_ts"])
    result = max(results, key=lambda result: result["peak_generated_bytes"])
    result["decode_tok_s"] = common.summary([result["decode_tok_s"] for result in results], 3)
    result["read_gb_s"] = round(result["decode_tok_s"]["median"] * result["read_bytes_per_token"] / 1e9, 2)
    if peers:
        result["llama_cpp_decode_tok_s"] = common.summary(peers, 3)
    limit = result["parameter_bytes"] + LIMIT_ABOVE_PARAMETERS
    result |= {"name": options.name, "limit_bytes": limit, "within_limit": result["peak_generated_bytes"] <= limit}
    print(json.dumps(result, indent=1))
    common.write(f"memory-{options.name}", result)


if __name__ == "__main__":
    main()
