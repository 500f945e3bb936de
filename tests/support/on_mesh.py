"""Models on meshes of eight devices, in a separate process, which prints a line of JSON for each argument:

python -m support.on_mesh FOLDER CASE@MESH ...

CASE is a tiny model of `support.goldens`, whose logits must be those of transformers, or "engine": the model in the package.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

import ferrum_jax as fj
from ferrum_jax import memory, program_store, programs
from support.golden_checks import check_logits
from support.goldens import golden_cases, tiny_gemma, tiny_hybrids, tiny_latent, tiny_mixtures, tiny_models

TINY = Path(fj.__file__).parent / "data" / "tiny-moe.gguf"
PROMPTS = ["Once upon a time there was a little dog", "Lily", "Once upon a time there was a cat. The cat sat on the"]
CHOOSING = [
    fj.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    fj.SamplingParams(max_tokens=9, temperature=0.9, top_p=0.9, seed=3, logprobs=2, repetition_penalty=1.1),
    fj.SamplingParams(max_tokens=12, temperature=0.0, logit_bias={300: 2.0}),
]


def written(name: str, folder: Path) -> tuple[Path, dict[str, np.ndarray], list[list[int]]]:
    """The file of a case, its golden arrays and its prompts."""
    for case in golden_cases.CASES:
        if case.name == name:
            path = golden_cases.HERE / f"{name}.gguf" if case.quantized else folder / f"{name}.gguf"
            if not path.exists():
                tiny_models.write(case.spec, path)
            prompts = tiny_models.prompts(case.spec.vocab, lengths=case.lengths)
            return path, dict(np.load(golden_cases.HERE / f"{name}.npz")), prompts
    for cases in (tiny_mixtures, tiny_hybrids, tiny_latent, tiny_gemma):
        for spec in (spec for spec in cases.CASES if spec.name == name):
            cases.write_gguf(spec, folder / f"{name}.gguf")
            prompts = tiny_models.prompts(spec.vocab, lengths=cases.LENGTHS)
            return folder / f"{name}.gguf", dict(np.load(cases.HERE / f"{name}.npz")), prompts
    raise KeyError(name)


def family(name: str, mesh: str, folder: Path) -> dict[str, Any]:
    """Checks the logits of a case; how many of its planes are cut, and whether heads are."""
    path, golden, prompts = written(name, folder)
    model = fj.load(path, dtype="float32", mesh=mesh)
    check_logits(model, golden, prompts)
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params))
    return {"cut": cut, "heads": bool(model._runtime.placement.rules["heads"])}


def engine(mesh: str) -> dict[str, Any]:
    """An engine on a mesh against one on a device: tokens and log-probabilities, alone, together, in chunks and with a prefix
    that is known; and what its programs are."""
    sizes = {"max_seqs": 2, "num_pages": 32, "page_size": 4, "token_budget": 16}
    results: list[Any] = []
    for place in (None, mesh):
        model = fj.load(TINY, dtype="float32", max_seq_len=64, mesh=place)
        with fj.Engine(model, sizes) as running:
            alone = [running.submit(*each).result() for each in zip(PROMPTS, CHOOSING, strict=True)]
            requests = [running.submit(*each) for each in zip(PROMPTS, CHOOSING, strict=True)]
            together = [request.result() for request in requests]
            assert [c.token_ids for c in alone] == [c.token_ids for c in together], place
            assert running.metrics()["prefix_hit_pages"] > 0
            executor = running._executor
            compiled = {str(bucket): executor.compile(bucket).compiled for bucket in executor.buckets()}
            state = memory.nbytes(executor.state), memory.nbytes(executor.slots)
        results.append(alone)
    pairs = list(zip(*results, strict=True))
    scores = [abs(a[1] - b[1]) for one, many in pairs for x, y in zip(one.logprobs or [], many.logprobs or [], strict=True)
              for a, b in zip(x, y, strict=True)]  # fmt: skip
    return {
        "tokens": [one.token_ids == many.token_ids for one, many in pairs],
        "scores": [len(scores), max(scores)],
        "state": state,
        "aliased": {name: program.memory_analysis().alias_size_in_bytes for name, program in compiled.items()},
        "collectives": {name: collectives(program.as_text()) for name, program in compiled.items()},
    }


def collectives(text: str) -> list[str]:
    """The names of the operations between devices in a program; those of a loop's body once."""
    names = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"
    return sorted(re.findall(rf" = \S+ ({'|'.join(names)})(?:-start)?\(", text))


def main(folder: str, *arguments: str) -> None:
    programs.COMPILER_OPTIONS["cpu"] = {"xla_backend_optimization_level": 0}  # compiles in half of the time
    program_store.directory = lambda: None
    for argument in arguments:
        name, mesh = argument.split("@")
        found = engine(mesh) if name == "engine" else family(name, mesh, Path(folder))
        print(json.dumps({argument: found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
