"""Two layers of the real model, on kernels and in plain float32: do the logits agree?

With the same weights: one prefill of several sequences and one decode step after it. Bound: the embedding outweighs what two
layers add to it, and what they add is off by a few hundredths (check_kernels), so a row of logits may be off by five roundings
of the dtype. Nine rows in ten must keep to that bound: where the router's odds of two experts lie within the error, the other
expert may be taken, and the row is as far off as the two differ. The bound over all rows is four times as wide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import weights
from benchmarks.gpu.check_attention import without_kernels
from benchmarks.gpu.lab import Lab
from ferrum_jax import functional
from ferrum_jax.models.decoder import RaggedBatch
from pallas_kernels import dispatch

LENGTHS = (40, 17, 63, 40)
PAGE = 16
COMPILED_ELSEWHERE = (weights.draw, weights.normal)
BOUND = {"bfloat16": 5 * 2.0**-8, "float16": 5 * 2.0**-11}


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    two = dataclasses.replace(lab.sizes.config, num_layers=2)
    made: dict[str, Any] = {}

    def both(dtype: str) -> Iterator[dict]:
        if not made:
            made["params"] = weights.make(lab, two)
            made["exact"] = pair(lab, made["params"], dataclasses.replace(two, dtype="float32"), exact_forward)
        got = pair(lab, made["params"], dataclasses.replace(two, dtype=dtype), functional.forward)
        if not lab.collecting:
            for kind, logits, exact in zip(("prefill", "decode"), got, made["exact"], strict=True):
                yield compare(f"logits of two layers, {dtype}, {kind}", logits, exact, BOUND[dtype])

    for dtype in list(BOUND)[: 1 if lab.rehearsal else 2]:  # check_kernels compiles float16 already
        yield dtype, lambda dtype=dtype: both(dtype)


def pair(lab: Lab, params, config, forward) -> list:
    """Logits of all tokens of a prefill, and of a decode step after it."""
    rng = np.random.default_rng(3)
    count = len(LENGTHS)
    pages = -(-(max(LENGTHS) + 1) // PAGE)
    table = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    cache = lab.run(new_cache, config=config, pages=count * pages)
    logits = []
    for lengths, queries in ((LENGTHS, LENGTHS), ([n + 1 for n in LENGTHS], [1] * count)):
        row = np.repeat(np.arange(count), queries)
        positions = np.concatenate([np.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)])
        batch = RaggedBatch(
            tokens=rng.integers(0, config.vocab_size, len(row)),
            positions=positions,
            slots=table[row, positions // PAGE] * PAGE + positions % PAGE,
            query_starts=np.concatenate([[0], np.cumsum(queries)]),
            kv_lengths=np.array(lengths),
            page_table=table,
            logits_rows=np.arange(len(row)),
        )
        batch = jax.tree.map(lambda field: np.asarray(field, np.int32), batch)
        found, cache = lab.run(forward, params, cache, batch, donate=(1,), config=config)
        logits.append(found if lab.collecting else np.asarray(found, np.float64))
    return logits


def compare(name: str, logits: np.ndarray, exact: np.ndarray, bound: float) -> dict:
    rows = np.sqrt(np.mean((logits - exact) ** 2, -1) / np.mean(exact**2, -1))
    error, overall = float(np.quantile(rows, 0.9)), float(np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)))
    best = logits.argmax(-1)
    gaps = exact.max(-1) - np.take_along_axis(exact, best[:, None], -1)[:, 0]
    agreement = float((gaps == 0).mean())
    row = {"name": name, "error": error, "bound": bound, "overall": overall, "overall_bound": 4 * bound}
    row |= {"rows": len(exact), "worst_row": float(rows.max()), "top1_agreement": agreement, "worst_gap": float(gaps.max())}
    row["logit_rms"] = float(np.sqrt(np.mean(exact**2)))
    return row | {"ok": bool(error <= bound and overall <= 4 * bound and agreement >= 0.8)}


# Programs


def new_cache(*, config, pages: int):
    return functional.new_cache(config, num_pages=pages, page_size=PAGE, dtype=config.dtype)


def exact_forward(params, cache, batch: RaggedBatch, *, config):
    """functional.forward without kernels."""
    with dispatch.on(without_kernels()):
        return functional.forward(params, cache, batch, config=config)
