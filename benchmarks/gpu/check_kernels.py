"""Is every kernel right on this device? Each is compared with float64 on the host, for every format and both dtypes.

Error model: a weight is computed with a few roundings to the dtype, the largest of them on a term (scale times integer, or
offset) of up to twice the weight. They are independent, so a product of random rows is off by their root mean square. A mixture
of experts is three such products and one rounding of the intermediate values. Bounds hold for the whole result (its norm) and,
six times wider, for each value.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.gpu.lab import Lab
from pallas_kernels.blocks import FORMATS, unpack
from pallas_kernels.blocks.layouts import LAYOUTS, choose
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.blocks.synthetic import random_blocks
from pallas_kernels.grouped_matmul import expert_ffn, grouped_matmul
from pallas_kernels.grouped_matmul.parts import Biases, Clamp
from pallas_kernels.quantized_matmul import quantized_matmuls, swiglu
from pallas_kernels.routing import Router, route

KERNEL_FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4")
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative rounding error
MATMUL, SWIGLU, MIXTURE = 3, 5, 6  # bounds, in multiples of UNIT
EXPERTS, TOP_K, INNER, OUTER = 8, 3, 512, 768
NOT_CHOSEN = (2, 5)  # experts whose blocks hold NaN
CLAMP = Clamp(limit=1.0, alpha=1.702)
AHEAD = True  # its programs are compiled in parallel, before the first step


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    formats = KERNEL_FORMATS[:2] if lab.rehearsal else KERNEL_FORMATS  # tests/aot compiles all
    yield "route", functools.partial(check_route, lab)
    yield "clamped experts", functools.partial(check_clamped, lab, "MXFP4", "bfloat16")
    for dtype in UNIT:
        for format in formats:
            yield f"{format} {dtype}", functools.partial(check_format, lab, format, dtype)


def experts_of(lab: Lab, format: str, rng: np.random.Generator) -> tuple[dict[str, Matrix], dict[str, np.ndarray]]:
    """Random gate, up and down, on the device and in float64."""
    stored, exact = {}, {}
    for name, rows, columns in (("gate", INNER, OUTER), ("up", INNER, OUTER), ("down", OUTER, INNER)):
        raw = random_blocks(format, EXPERTS * rows, columns, rng, 0.03).reshape(EXPERTS, rows, -1)
        exact[name] = reference_weights(raw, format)
        raw[list(NOT_CHOSEN)] = 0xFF
        memory_layout = choose(format, rows, columns, lab.target)
        stored[name] = lab.run(pack, raw, format=format, memory_layout=memory_layout, rows=rows, columns=columns)
    return stored, exact


def check_format(lab: Lab, format: str, dtype: str) -> Iterator[dict]:
    rng = np.random.default_rng(zlib.crc32(format.encode()))
    stored, exact = experts_of(lab, format, rng)
    if dtype == "bfloat16":
        yield from check_layout(lab, stored["gate"], exact["gate"], format)
    unit = UNIT[dtype]
    # float16 differs from bfloat16 only in the arithmetic of an unpacked weight, so one size of each operation is enough.
    which = slice(None) if dtype == "bfloat16" else slice(1, 2)
    for rows in lab.sizes.check_rows[which]:
        x = np.asarray(rng.standard_normal((rows, OUTER)), dtype)
        result = twice(lab, multiply, x, stored["gate"], stored["up"])
        if not lab.collecting:
            wanted = [x.astype(np.float64) @ exact[name][0].T for name in ("gate", "up")]
            backends = lab.backends(multiply, x, stored["gate"], stored["up"])
            yield compare(lab, f"matmul {format} {dtype}, {rows} rows", result, wanted, MATMUL * unit, backends)
    for rows in lab.sizes.check_rows[:2][which]:
        x = np.asarray(rng.standard_normal((rows, OUTER)), dtype)
        result = twice(lab, gated, x, stored["gate"], stored["up"])
        if not lab.collecting:
            gate, up = (x.astype(np.float64) @ exact[name][0].T for name in ("gate", "up"))
            backends = lab.backends(gated, x, stored["gate"], stored["up"])
            yield compare(lab, f"swiglu {format} {dtype}, {rows} rows", result, [silu(gate) * up], SWIGLU * unit, backends)
    chosen = np.setdiff1d(np.arange(EXPERTS), NOT_CHOSEN)
    for tokens in lab.sizes.check_tokens[which]:
        x = np.asarray(rng.standard_normal((tokens, OUTER)), dtype)
        ids = np.stack([rng.permutation(chosen)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
        ids[-1, TOP_K - 1 if tokens == 1 else 0 :] = EXPERTS  # a token with one expert fewer, or padding
        weights = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
        arguments = (x, ids, weights, stored["gate"], stored["up"], stored["down"])
        result = twice(lab, mixture, *arguments)
        if not lab.collecting:
            wanted = [mixture_of(x, ids, weights, exact)]
            backends = lab.backends(mixture, *arguments)
            yield compare(lab, f"experts {format} {dtype}, {tokens} tokens", result, wanted, MIXTURE * unit, backends)
    rows = lab.sizes.check_tokens[-1]
    x = np.asarray(rng.standard_normal((rows, OUTER)), dtype)
    ids = np.sort(rng.choice(chosen, rows - rows // 8))
    sizes = np.bincount(ids, minlength=EXPERTS).astype(np.int32)  # the last rows belong to no expert
    result = twice(lab, grouped, x, sizes, stored["gate"])
    if not lab.collecting:
        wanted = np.zeros((rows, INNER))
        wanted[: len(ids)] = [exact["gate"][i] @ row.astype(np.float64) for i, row in zip(ids, x, strict=False)]
        backends = lab.backends(grouped, x, sizes, stored["gate"])
        yield compare(lab, f"grouped {format} {dtype}, {rows} rows", result, [wanted], MATMUL * unit, backends)


def check_clamped(lab: Lab, format: str, dtype: str) -> Iterator[dict]:
    """Experts with biases and a clamped SwiGLU, as gpt-oss has them."""
    rng = np.random.default_rng(8)
    stored, exact = experts_of(lab, format, rng)
    widths = {"gate": INNER, "up": INNER, "down": OUTER}
    biases = Biases(*(rng.normal(0, 0.3, (EXPERTS, width)).astype(np.float32) for width in widths.values()))
    for tokens in lab.sizes.check_tokens[:2]:
        x = np.asarray(rng.standard_normal((tokens, OUTER)), dtype)
        ids = np.stack([rng.permutation(np.setdiff1d(np.arange(EXPERTS), NOT_CHOSEN))[:TOP_K] for _ in range(tokens)])
        ids, weights = ids.astype(np.int32), rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
        arguments = (x, ids, weights, stored["gate"], stored["up"], stored["down"], biases)
        result = twice(lab, clamped, *arguments)
        if not lab.collecting:
            wanted = [mixture_of(x, ids, weights, exact, biases)]
            backends = lab.backends(clamped, *arguments)
            yield compare(
                lab, f"clamped experts {format} {dtype}, {tokens} tokens", result, wanted, MIXTURE * UNIT[dtype], backends
            )


def check_layout(lab: Lab, gate: Matrix, exact: np.ndarray, format: str) -> Iterator[dict]:
    """Packing and decoding gives the same bits."""
    got = lab.run(decoded, gate)
    if not lab.collecting:
        wrong = int((np.asarray(got) != exact[0]).sum())
        yield {"name": f"memory layout {gate.memory_layout} of {format}", "error": wrong, "bound": 0, "ok": wrong == 0}


def check_route(lab: Lab) -> Iterator[dict]:
    rng = np.random.default_rng(7)
    for tokens in (1, 64):
        logits = rng.standard_normal((tokens, 128)).astype(np.float32)
        result = lab.run(routed, logits, np.ones(tokens, bool))
        if not lab.collecting:
            odds = np.exp(logits.astype(np.float64))
            wanted = np.argsort(-odds, axis=1, kind="stable")[:, :8]
            best = np.take_along_axis(odds, wanted, 1)
            error = float(np.abs(np.asarray(result[1]) - best / best.sum(1, keepdims=True)).max())
            backends = lab.backends(routed, logits, np.ones(tokens, bool))
            ok = bool((np.asarray(result[0]) == wanted).all()) and error <= 1e-6
            ok = ok and not (lab.has_kernels and "xla" in backends)
            yield {"name": f"route, {tokens} tokens", "error": error, "bound": 1e-6, "ok": ok, "backends": backends}


def compare(lab: Lab, name: str, results: tuple, wanted: list[np.ndarray], bound: float, backends: str) -> dict:
    """A row of the report: the relative error of the whole result and of the worst value. Two runs must agree to the bit, and a
    device with kernels must have run them."""
    first, second = results
    error = worst = 0.0
    for got, want in zip(first, wanted, strict=True):
        difference = np.abs(got.astype(np.float64) - want)
        scale = np.sqrt(np.mean(want * want))
        error = max(error, float(np.sqrt(np.mean(difference**2)) / scale), key=nan_first)
        worst = max(worst, float(difference.max() / scale), key=nan_first)
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))
    ok = error <= bound and worst <= 6 * bound and same and not (lab.has_kernels and "xla" in backends)
    row = {"name": name, "error": error, "bound": bound, "worst": worst, "worst_bound": 6 * bound}
    return row | {"same_twice": same, "backends": backends, "ok": ok}


def nan_first(value: float) -> float:
    return np.inf if np.isnan(value) else value


def twice(lab: Lab, function: Callable, *args) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """The results of two runs on the host."""
    runs = [lab.run(function, *args) for _ in range(2)]
    return None if lab.collecting else tuple([np.asarray(y) for y in jax.tree.leaves(run)] for run in runs)


def reference_weights(raw: np.ndarray, format: str) -> np.ndarray:
    """Weights of blocks uint8 [..., bytes], computed on the host's processor if jax has it."""
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:
        host = jax.devices()[0]
    with jax.default_device(host):
        return np.asarray(unpack(raw, format), np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mixture_of(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, exact: dict[str, np.ndarray], biases: Biases | None = None
) -> np.ndarray:
    """biases: then the SwiGLU is clamped, too."""
    y = np.zeros(x.shape, np.float64)
    for token, slot in zip(*np.nonzero(ids < EXPERTS), strict=True):
        expert = ids[token, slot]
        gate, up, down = (exact[name][expert] for name in ("gate", "up", "down"))
        g, u = (x[token].astype(np.float64) @ matrix.T for matrix in (gate, up))
        if biases is None:
            result = (silu(g) * u) @ down.T
        else:
            g = np.minimum(g + biases.gate[expert], CLAMP.limit)
            u = np.clip(u + biases.up[expert], -CLAMP.limit, CLAMP.limit)
            result = ((u + 1) * g / (1 + np.exp(-CLAMP.alpha * g))) @ down.T + biases.down[expert]
        y[token] += weights[token, slot] * result
    return y


# Programs


def pack(raw, *, format: str, memory_layout: str, rows: int, columns: int) -> Matrix:
    """Blocks uint8 [experts, rows, bytes] in the form that the memory layout keeps."""
    planes = jax.vmap(lambda stored: LAYOUTS[memory_layout].pack(stored, format))(raw)
    assert FORMATS[format].storage.itemsize == 1
    return Matrix(tuple(planes), (), format, memory_layout, rows, columns)


def decoded(matrix: Matrix) -> jax.Array:
    planes = tuple(plane[0] for plane in matrix.planes)
    return LAYOUTS[matrix.memory_layout].decode(planes, matrix.format, matrix.rows, matrix.columns)


def multiply(x, gate: Matrix, up: Matrix):
    return quantized_matmuls(x, [gate.at(0), up.at(0)])


def gated(x, gate: Matrix, up: Matrix) -> jax.Array:
    return swiglu(x, gate.at(0), up.at(0))


def mixture(x, ids, weights, gate: Matrix, up: Matrix, down: Matrix) -> jax.Array:
    return expert_ffn(x, ids, weights, gate, up, down)


def clamped(x, ids, weights, gate: Matrix, up: Matrix, down: Matrix, biases: Biases) -> jax.Array:
    return expert_ffn(x, ids, weights, gate, up, down, biases=biases, clamp=CLAMP)


def grouped(x, sizes, gate: Matrix) -> jax.Array:
    return grouped_matmul(x, sizes, gate)


def routed(logits, live):
    return route(logits, live, Router(8))
