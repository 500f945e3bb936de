"""llama.cpp as a peer: its server, from the `xllamacpp` wheel, in a separate process.

    with LlamaCpp(path, threads=2, context=640) as peer:
        tokens = peer.generate(prompt_ids, 64)

The wheel uses no instructions beyond AVX2. The child prints one line of JSON when the model is loaded, and exits when its
standard input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A server process. `context`: tokens of a slot; `slots`: requests that it serves at once. `pid`; `build`: what the library
    reports about its instruction sets."""

    def __init__(self, path: Path, *, threads: int, context: int, slots: int = 1):
        command = [sys.executable, "-m", "benchmarks.llama_cpp", *map(str, (path, threads, context, slots))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.pid = self.process.pid
        for line in self.process.stdout:
            if line.startswith("{"):
                facts = json.loads(line)
                break
        else:
            raise RuntimeError(f"llama.cpp did not start: exit code {self.process.wait()}")
        self.address, self.build = facts["address"], facts["build"]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """`tokens` greedy token ids after `prompt`; nothing is kept from earlier requests."""
        with self._ask(prompt, tokens, stream=False) as reply:
            return self._whole(json.load(reply)["tokens"], tokens)

    def stream(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """The same, and when the first token arrived, on the clock of time.perf_counter."""
        times, made = [], []
        with self._ask(prompt, tokens, stream=True) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    times.append(time.perf_counter())
                    made += json.loads(line[6:]).get("tokens", [])
        return self._whole(made, tokens), times[0]

    def _ask(self, prompt: list[int], tokens: int, stream: bool) -> Any:
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": stream,
        }
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(f"{self.address}/completion", json.dumps(request).encode(), headers)
        return urllib.request.urlopen(call)

    def _whole(self, made: list[int], tokens: int) -> list[int]:
        if len(made) != tokens:
            raise RuntimeError(f"llama.cpp was asked for {tokens} tokens and gave {len(made)}")
        return made


def serve(path: str, threads: int, context: int, slots: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context * slots
    params.n_parallel = slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    sets = [part.split("=")[0].strip().removeprefix("CPU : ") for part in xllamacpp.get_system_info().split("|")]
    print(json.dumps({"address": server.listening_address, "build": " ".join(filter(None, sets))}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
