"""Other engines on the same GPU at the shapes of `benchmarks.gpu`: transformers, and llama.cpp where it can be built.

    python -m benchmarks.gpu_peers [--llama-cpp FOLDER] [--out FOLDER]

transformers: Qwen3MoeForCausalLM in bfloat16 with random weights made on the device, a static KV cache and its grouped (for few
rows: batched) experts, both eager and compiled by torch with CUDA graphs. llama.cpp: its CUDA backend on a synthetic Q4_K_M
file, by llama-batched-bench, which prints speeds only. FOLDER holds that program or llama.cpp's sources; building them needs
nvcc and cmake on the device machine, and making the file needs the `gguf` package. What cannot be measured gets a row that says
why. `--rehearse` runs transformers at small shapes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu.run import line, run_child, slug
from benchmarks.gpu.sizes import REAL, SMALL, Sizes

LIMIT = 560.0
MODEL = "qwen3-30b-a3b"


def emit(kind: str, value: Any) -> None:
    print("@" + json.dumps({kind: value}), flush=True)


# transformers, in a separate process


class Transformers:
    """A model of random weights on the device, its prefill and its decoding."""

    def __init__(self, sizes: Sizes):
        import torch
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        self.torch, self.sizes = torch, sizes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        c = sizes.config
        config = Qwen3MoeConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token,
            moe_intermediate_size=c.expert_intermediate_size,
            norm_topk_prob=True,
            max_position_embeddings=c.context_length,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
        with torch.device(self.device):
            made = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model = made.eval()
        self.can_choose = hasattr(self.model, "set_experts_implementation")

    def experts(self, implementation: str) -> None:
        """Sets how the model multiplies its experts; an error if this version of transformers does not offer the choice."""
        if not self.can_choose:
            raise RuntimeError("this version of transformers cannot choose how experts are multiplied")
        self.model.set_experts_implementation(implementation)

    def tokens(self, rows: int, length: int):
        return self.torch.randint(0, self.sizes.config.vocab_size, (rows, length), device=self.device)

    def cache(self):
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=self.sizes.capacity)

    def forward(self, tokens, cache, run: Callable | None = None):
        """The likeliest next token of each row, [rows, 1]."""
        run = self.model if run is None else run
        logits = run(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1).clone()

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def compiled(self) -> Callable:
        if self.device == "cpu":
            return self.torch.compile(self.model, backend="eager")
        return self.torch.compile(self.model, mode="reduce-overhead")

    def timed(self, work: Callable[[], Any], rounds: int) -> list[float]:
        taken = []
        for _ in range(rounds):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - begin)
        return taken

    def prefill(self) -> Iterator[dict]:
        length = self.sizes.prompt
        tokens = self.tokens(1, length)
        self.forward(tokens, self.cache())
        taken = self.timed(lambda: self.forward(tokens, self.cache()), self.sizes.rounds)
        rates = [length / seconds for seconds in taken]
        yield {"value": statistics.median(rates), "samples": common.summary(rates, 1)}

    def decode(self, rows: int, compile: bool) -> Iterator[dict]:
        """Decode steps of `rows` rows after the context; a compiled model's tokens are compared with those of the eager one."""
        steps, begin = self.sizes.steps, time.perf_counter()
        prompt = self.tokens(rows, self.sizes.context)

        def run(forward: Callable | None, count: int) -> tuple[list, list[float]]:
            cache = self.cache()
            token = self.forward(prompt, cache)
            chosen, taken = [], []
            for _ in range(count):
                if forward is not None and self.device == "cuda":
                    self.torch.compiler.cudagraph_mark_step_begin()
                taken += self.timed(lambda: chosen.append(self.forward(chosen[-1] if chosen else token, cache, forward)), 1)
            return [token.tolist() for token in chosen], taken

        plain, taken = run(None, steps)
        row: dict[str, Any] = {"batch": rows, "context": self.sizes.context}
        if compile:
            compiled = self.compiled()
            run(compiled, 4)  # compiles and records the graph
            row["compile_s"] = round(time.perf_counter() - begin, 1)
            chosen, taken = run(compiled, steps)
            equal = next((i for i, pair in enumerate(zip(plain, chosen, strict=True)) if pair[0] != pair[1]), steps)
            row["check"] = {"equal_steps": equal, "steps": steps, "ok": equal > 0}
        rates = [rows / seconds for seconds in taken[1:]]
        yield row | {"value": statistics.median(rates), "samples": common.summary(rates, 1)}


def transformers(sizes: Sizes) -> None:
    """Emits a row for each case; a case that fails emits why."""
    import torch
    import transformers as package

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    emit("hello", {"device": {"name": device}, "versions": {"torch": torch.__version__, "transformers": package.__version__}})
    model = Transformers(sizes)
    emit("row", {"name": "transformers, weights made", "bytes": sum(p.nbytes for p in model.model.parameters())})
    cases: list[tuple[str, str, Callable[[], Iterator[dict]]]] = [("prefill", "grouped_mm", model.prefill)]
    for compile in (False, True):
        for rows, experts in ((1, "batched_mm"), (1, "grouped_mm"), (sizes.batch, "grouped_mm")):
            how = "compiled" if compile else "as written"
            cases.append(
                (f"decode, batch {rows}, {how}", experts, lambda rows=rows, compile=compile: model.decode(rows, compile))
            )
    for name, experts, case in cases:
        emit("begin", name)
        label = {"name": f"transformers, {name}, {experts}", "unit": "tokens/s"}
        try:
            model.experts(experts)
            with torch.inference_mode():
                for row in case():
                    emit("row", label | row)
        except Exception as error:
            emit("row", {"name": label["name"], "not_measured": f"{type(error).__name__}: {str(error)[:500]}"})
        if compile:
            torch.compiler.reset()


# llama.cpp


def llama_cpp(folder: Path | None, sizes: Sizes) -> Iterator[dict]:
    """Rows of llama-batched-bench, or one that says why there are none."""
    reason = cannot_build(folder)
    if reason is not None:
        yield {"name": "llama.cpp", "not_measured": reason}
        return
    assert folder is not None
    with tempfile.TemporaryDirectory() as scratch:
        program = shutil.which("llama-batched-bench", path=str(folder)) or build(folder, Path(scratch) / "build")
        from benchmarks import make_synthetic

        path = Path(scratch) / f"{MODEL}.gguf"
        make_synthetic.make(path, MODEL)
        many = sizes.batch
        for prompt, tokens, rows in ((sizes.prompt, 4, 1), (sizes.context, 64, 1), (sizes.context, 64, many)):
            yield from batched_bench(program, path, prompt, tokens, rows)


def cannot_build(folder: Path | None) -> str | None:
    if folder is None:
        return "no --llama-cpp FOLDER was given"
    if importlib.util.find_spec("gguf") is None:
        return "the gguf package, which makes the file, is not installed"
    if shutil.which("llama-batched-bench", path=str(folder)):
        return None
    if not (folder / "CMakeLists.txt").is_file():
        return f"{folder} holds neither llama-batched-bench nor llama.cpp's sources"
    absent = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found" if absent else None


def build(sources: Path, folder: Path) -> str:
    """Builds llama-batched-bench for this machine's GPU; its path."""
    options = ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native", "-DLLAMA_CURL=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", sources, "-B", folder, *options], check=True, stdout=sys.stderr)
    jobs = str(len(os.sched_getaffinity(0)))
    target = ["--target", "llama-batched-bench", "-j", jobs]
    subprocess.run(["cmake", "--build", folder, *target], check=True, stdout=sys.stderr)
    return str(folder / "bin" / "llama-batched-bench")


def batched_bench(program: str, path: Path, prompt: int, tokens: int, rows: int) -> Iterator[dict]:
    sizes = {"-npp": prompt, "-ntg": tokens, "-npl": rows, "-c": rows * (prompt + tokens) + 256, "-b": 2048, "-ub": 2048}
    flags = [str(part) for pair in sizes.items() for part in pair]
    command = [program, "-m", str(path), "-ngl", "99", "-fa", "on", "--output-format", "jsonl", *flags]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [json.loads(row) for row in text.splitlines() if row.startswith("{")]
    for row in found:
        if tokens > 8:
            name = f"llama.cpp, decode, batch {rows}"
            yield {"name": name, "batch": rows, "context": prompt, "value": row["speed_tg"], "unit": "tokens/s"}
        else:
            yield {"name": "llama.cpp, prefill", "tokens": prompt, "value": row["speed_pp"], "unit": "tokens/s"}


# The parent


def measure(out: Path, folder: Path | None, small: bool) -> int:
    """Runs both and writes the rows so far after each one; 0 if every row was measured or says why not."""
    found: dict[str, Any] = {"benchmark": "gpu-peers", "machine": common.machine(), "versions": {}, "rows": []}
    begin, sizes = time.monotonic(), SMALL if small else REAL

    def event(kind: str, value: Any) -> None:
        if kind == "hello":
            found["device"] = value["device"]
            found["versions"] = value["versions"]
        elif kind == "row":
            found["rows"].append(value)
            print(line(value) if "value" in value else f"{value['name']}: {value.get('not_measured', 'done')}", flush=True)
        if "device" in found:
            out.mkdir(parents=True, exist_ok=True)
            name = slug(found["device"]["name"])
            (out / f"gpu-peers-{name}.json").write_text(json.dumps(found, indent=1) + "\n")

    module = ["benchmarks.gpu_peers", "--transformers", *(["--rehearse"] if small else [])]
    ended = run_child(module, {}, LIMIT, LIMIT, event)
    if ended is not None:
        event("row", {"name": "transformers, the rest", "not_measured": ended})
    left = LIMIT - (time.monotonic() - begin)
    if folder is not None and left < 120:
        event("row", {"name": "llama.cpp", "not_measured": f"{left:.0f} s were left"})
    else:
        try:
            for row in llama_cpp(folder, sizes):
                event("row", row)
        except (OSError, subprocess.SubprocessError, json.JSONDecodeError, KeyError) as error:
            event("row", {"name": "llama.cpp", "not_measured": f"{type(error).__name__}: {error}"[:500]})
    return 0 if ended is None else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="llama-batched-bench, or llama.cpp's sources")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU; nothing is kept")
    parser.add_argument("--transformers", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transformers:
        transformers(SMALL if options.rehearse else REAL)
        return 0
    if options.rehearse:
        with tempfile.TemporaryDirectory() as out:
            return measure(Path(out), options.llama_cpp, small=True)
    return measure(options.out, options.llama_cpp, small=False)


if __name__ == "__main__":
    sys.exit(main())
