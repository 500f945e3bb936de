"""Weights on which quantizers are measured, made from seeds: easy, uneven and extreme ones."""

from collections.abc import Iterator

import numpy as np

ROWS, COLUMNS = 48, 512


def cases() -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 [ROWS, COLUMNS])."""
    rng = np.random.default_rng(20)
    normal = rng.standard_normal((ROWS, COLUMNS))
    yield "normal", _float32(normal * 0.02)
    yield "heavy", _float32(rng.standard_t(2.5, (ROWS, COLUMNS)) * 0.01)
    outlier = normal * 0.02
    outlier[:, ::97] *= 60.0
    yield "outlier", _float32(outlier)
    yield "shifted", _float32(normal * 0.01 + rng.uniform(-0.05, 0.05, (ROWS, 1)))
    yield "uneven", _float32(normal * np.exp(rng.standard_normal((ROWS, COLUMNS // 32)).repeat(32, 1) * 1.5) * 0.01)
    yield "positive", _float32(np.abs(normal) * 0.02)
    yield "constant", _float32(np.ones((ROWS, COLUMNS)) * rng.uniform(-2, 2, (ROWS, 1)))
    yield "zero", np.zeros((ROWS, COLUMNS), np.float32)
    yield "tiny", _float32(normal * np.logspace(-12, -4, ROWS)[:, None])
    yield "large", _float32(normal * np.logspace(0, 3, ROWS)[:, None])
    sparse = np.where(rng.random((ROWS, COLUMNS)) < 0.9, 0.0, normal)
    yield "sparse", _float32(sparse)
    yield "two values", _float32(np.where(normal > 0, 0.3, -0.1))


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def squared_error(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.square(values.astype(np.float64) - weights).sum())
