"""llama.cpp as a peer: its server, from the `xllamacpp` wheel, in a process of its own.

    with LlamaCpp(path, threads=2, context=640) as peer:
        tokens = peer.generate(prompt_ids, 64)

The wheel is built for AVX2 and no further. The child prints one line of JSON when the model is loaded and leaves when
its standard input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A server process. `pid`; `build`: what the library says about its instruction sets."""

    def __init__(self, path: Path, *, threads: int, context: int):
        command = [sys.executable, "-m", "benchmarks.llama_cpp", str(path), str(threads), str(context)]
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
        """`tokens` greedy token ids after `prompt`, nothing of which is kept from earlier requests."""
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(f"{self.address}/completion", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(call) as reply:
            made = json.load(reply)["tokens"]
        if len(made) != tokens:
            raise RuntimeError(f"llama.cpp was asked for {tokens} tokens and gave {len(made)}")
        return made


def serve(path: str, threads: int, context: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    sets = [part.split("=")[0].strip().removeprefix("CPU : ") for part in xllamacpp.get_system_info().split("|")]
    print(json.dumps({"address": server.listening_address, "build": " ".join(filter(None, sets))}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
