"""Is the gated delta net right on this device? Results and kept states against float64 on the host: decoded tokens, drafts that
are verified, and prompts with whole chunks between other tokens.

Recurrent tokens are float32 sums of dk products; operands of a chunk's products are known to 2^-16, and its inverse sums a few.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.gpu.check_kernels import compare
from benchmarks.gpu.lab import Lab
from pallas_kernels.delta_net import DeltaState, Sequences, delta_net, reference

BOUND = {"decode": 1e-5, "verification": 1e-5, "prefill": 2e-4}
LAYERS, TAPS = 2, 4
AHEAD = True  # its programs are compiled in parallel, before the first step


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    batches = {  # of each sequence: tokens, and the position of the first
        "decode": [(1, 0), (1, 63), (1, 500)],
        "verification": [(5, 40), (3, 0)],
        "prefill": [(200, 0), (1, 77), (150, 50)],
    }
    for kind, batch in batches.items():
        yield kind, functools.partial(check, lab, kind, batch)


def check(lab: Lab, kind: str, batch: list[tuple[int, int]]) -> Iterator[dict]:
    """Half of the value heads share a key head. States of drafts are kept after each token."""
    rng, (heads, width) = np.random.default_rng(13), (32, 128) if lab.sizes.real else (4, 16)
    channels, every = 2 * heads * width, kind == "verification"

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    lengths, firsts = (np.array(column, np.int32) for column in zip(*batch, strict=True))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = int(starts[-1])
    last = np.isin(np.arange(tokens), starts[1:] - 1)
    places = np.arange(len(batch), len(batch) + tokens) if every else np.repeat(np.arange(len(batch)), lengths)
    writes = np.where(last | every, places, -1).astype(np.int32)
    count = len(batch) + (tokens if every else 0)
    positions = np.concatenate([first + np.arange(n) for n, first in batch]).astype(np.int32)
    sequences = Sequences(starts, positions, firsts == 0, np.arange(len(batch), dtype=np.int32), writes)
    tail, memory = normal(LAYERS, count, TAPS - 1, channels), normal(LAYERS, count, heads, width, width)
    gates = -rng.exponential(0.3, (tokens, heads)).astype(np.float32), rng.random((tokens, heads)).astype(np.float32)
    given = normal(tokens, channels), *gates, normal(channels, TAPS, scale=0.5)
    arguments = (*given, DeltaState(tail, memory), sequences)
    runs = [lab.run(recur, *arguments) for _ in range(2)]
    if lab.collecting:
        return
    wanted, kept = [], memory[1].astype(np.float64)
    for number, (a, b) in enumerate(itertools.pairwise(starts)):
        before = [array[1, number] * (firsts[number] > 0) for array in (tail, memory)]
        y, _, after = reference.delta_net(*(array[a:b] for array in given[:3]), given[3], *before, tiled=True)
        wanted.append(y)
        for token in range(a, b):
            if writes[token] >= 0:
                kept[writes[token]] = after[token - a]
    results = tuple([np.asarray(part) for part in run] for run in runs)
    backends = lab.backends(recur, *arguments)
    yield compare(lab, f"delta net, {kind}", results, [np.concatenate(wanted), kept], BOUND[kind], backends)


def recur(qkv, log_decay, beta, taps, state: DeltaState, sequences: Sequences) -> tuple[jax.Array, jax.Array]:
    """The results, and the memories of layer 1 afterwards."""
    y, state = delta_net(qkv, log_decay, beta, taps, state, 1, sequences, tiled=True)
    return y, state.memory[1]
