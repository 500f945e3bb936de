"""Fuzzing of checkpoint directories: damaged copies are either refused with a ModelFileError or read like sound ones.

One file of a sound directory is damaged as in test_gguf_fuzz, half of the time one of JSON. Number i of the mutants
depends on i alone.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from ferrum_jax.loading import validate
from ferrum_jax.weights.huggingface import open_directory
from support.directories import GPTQ, LLAMA, MOE, write
from unit.weights.test_gguf_fuzz import check_logits, refused

SAMPLES = 6
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-1", b"1e999", b"null", b"true", b'"x"', b"18446744073709551616"]


def check_parse(path: Path) -> None:
    """Opens the directory; whatever tensors it then has can be read."""
    with open_directory(path) as model:
        for info in model.tensors.values():
            assert model.read(info).nbytes == info.nbytes
            if info.order:
                assert model.read(info.order).nbytes == info.order.nbytes


def mutate(raw: bytes, end: int, rng: random.Random) -> bytes:
    """One to three mutations within the first `end` bytes."""
    made = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(min(end, len(made)) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            made[at : at + 1] = bytes([made[at] ^ (1 << rng.randrange(8))]) if made else b"x"
        elif kind == 1:
            made[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        elif kind == 2:
            made[at : at + rng.randrange(4)] = rng.choice(TOKENS)
        elif kind == 3:
            del made[at : at + rng.randrange(1, 65)]
        elif kind == 4:
            del made[at:]
        else:  # a digit becomes another one
            digits = [i for i in range(min(end, len(made))) if 48 <= made[i] < 58]
            if digits:
                made[rng.choice(digits)] = rng.choice(b"0123456789-")
    return bytes(made)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("seeds")
    paths = [write(spec, folder / spec.name) for spec in (LLAMA, MOE, GPTQ)]
    for path in paths:
        check_parse(path)
        validate(path)
    return paths


@pytest.mark.slow
def test_mutants_are_refused_or_sound(seeds: list[Path], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("--fuzz-mutations")
    path = tmp_path / "mutant"
    num_refused = num_sampled = 0
    for index in range(count):
        rng = random.Random(index)
        seed = seeds[index % len(seeds)]
        damaged = "model.safetensors"
        if rng.random() < 0.5:
            damaged = rng.choice(["config", "config", "tokenizer", "tokenizer_config", "generation_config"]) + ".json"
        raw = (seed / damaged).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little") if damaged == "model.safetensors" and rng.random() < 0.9 else len(raw)
        shutil.copytree(seed, path)
        (path / damaged).write_bytes(mutate(raw, end, rng))
        try:
            if refused(path, [check_parse, validate]):
                num_refused += 1
            elif num_sampled < SAMPLES and damaged != "tokenizer.json":
                num_sampled += 1
                refused(path, [check_logits])
        except Exception as error:
            error.add_note(f"mutant {index} of {seed.name}: {damaged}")
            raise
        shutil.rmtree(path)
    assert num_refused >= count // 4
    assert count - num_refused >= count // 20
