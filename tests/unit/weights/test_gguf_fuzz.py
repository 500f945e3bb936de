"""Fuzzing: damaged copies of sound model files are either refused with a ModelFileError or read like sound ones.

Half of the mutations fall into the header. Every mutant goes through `CHECKS`; the first `SAMPLES` mutants that all of
them accept go through `SAMPLE_CHECKS` too. A check takes the path and raises for a fault; ModelFileError and
UnsupportedModelError mean that the file was refused. Number i of the mutants depends on i alone.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.loading import validate
from ferrum_jax.weights.gguf import open_gguf
from support.tiny_gguf import write_tiny_llama

SAMPLES = 8
EXTREMES = [0, 1, 7, 8, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]


def check_parse(path: Path) -> None:
    """Opens the file; then tensors must lie within the file, not overlap, and be readable."""
    size = path.stat().st_size
    with open_gguf(path) as model:
        end = 0
        for info in sorted(model.tensors.values(), key=lambda info: info.offset):
            assert end <= info.offset
            end = info.offset + info.nbytes
            assert end <= size
            assert model.read(info).nbytes == info.nbytes
        assert all(type(key) is str for key in model.metadata)
        allowed = (int, float, bool, str, list, np.ndarray)
        assert all(isinstance(value, allowed) for value in model.metadata.values())


def check_logits(path: Path) -> None:
    """A file that loads also computes: finite or not, damaged weights decide, but logits of the right shape."""
    model = fj.load(path)
    (logits,) = model.logits([[1, 2, 3]])
    assert logits.shape == (3, model.config.vocab_size)


CHECKS: list[Callable[[Path], None]] = [check_parse, validate]
SAMPLE_CHECKS: list[Callable[[Path], None]] = [check_logits]


class Seed:
    """A sound file, the end of its header and the places of its integers (according to gguf-py)."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        reader = gguf.GGUFReader(path)
        self.header_size = reader.data_offset
        fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
        start = reader.data.ctypes.data
        self.integers = sorted(
            (part.ctypes.data - start + item * part.itemsize, part.itemsize)
            for field in fields
            for part in field.parts
            if part.dtype.kind in "iu" and part.itemsize >= 4
            for item in range(part.size)
        )


def mutate(seed: Seed, rng: random.Random) -> bytes:
    """One to three mutations of one kind each."""
    raw = bytearray(seed.raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        in_header = rng.random() < 0.5
        first, last = (0, seed.header_size) if in_header else (seed.header_size, len(seed.raw))
        at = min(rng.randrange(first, last), max(len(raw) - 1, 0))
        kind = rng.randrange(7) if in_header else rng.randrange(5)
        if kind == 0:
            raw[at : at + 1] = bytes([(raw[at] if at < len(raw) else 0) ^ (1 << rng.randrange(8))])
        elif kind == 1:
            run = rng.randrange(1, 9)
            raw[at : at + run] = rng.randbytes(run)
        elif kind == 2:
            raw[at:at] = rng.randbytes(rng.randrange(1, 65))
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 65)]
        elif kind == 4:
            del raw[at:]
        else:  # an integer becomes another one
            at, width = rng.choice(seed.integers)
            value = rng.choice(EXTREMES) if kind == 5 else (int.from_bytes(raw[at : at + width], "little") + 1)
            raw[at : at + width] = struct.pack("<Q", value % 2**64)[:width]
    return bytes(raw)


def refused(path: Path, checks: Iterable[Callable[[Path], None]]) -> bool:
    try:
        for check in checks:
            check(path)
    except (ModelFileError, UnsupportedModelError) as error:
        assert path.name in str(error)
        return True
    return False


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    """A whole model; a smaller one with tied weights; each sound by the checks that the mutants face."""
    folder = tmp_path_factory.mktemp("seeds")
    paths = [
        write_tiny_llama(folder / "whole.gguf"),
        write_tiny_llama(folder / "tied.gguf", hidden=32, heads=2, kv_heads=1, ffn=32, layers=1, tied=True, seed=1),
    ]
    for path in paths:
        for check in [*CHECKS, *SAMPLE_CHECKS]:
            check(path)
    return [Seed(path) for path in paths]


def test_mutants_are_refused_or_sound(seeds: list[Seed], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("--fuzz-mutations")
    path = tmp_path / "mutant.gguf"
    num_refused = num_sampled = 0
    for index in range(count):
        path.write_bytes(mutate(seeds[index % len(seeds)], random.Random(index)))
        try:
            if refused(path, CHECKS):
                num_refused += 1
            elif num_sampled < SAMPLES:
                num_sampled += 1
                refused(path, SAMPLE_CHECKS)
        except Exception as error:
            error.add_note(f"mutant {index}: mutate(seeds[{index % len(seeds)}], random.Random({index}))")
            raise
    # Both outcomes must occur, or the mutations are too weak or too strong to test anything.
    assert num_refused >= count // 4
    assert count - num_refused >= count // 10
