"""The gated delta net of one sequence in NumPy and float64, written from the contract alone, to test backends with."""

from __future__ import annotations

import numpy as np


def delta_net(
    qkv: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
    taps: np.ndarray,
    tail: np.ndarray,
    memory: np.ndarray,
    *,
    tiled: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result [tokens, H, dv], and tail [tokens, K - 1, channels] and memory [tokens, H, dk, dv] after each token; arguments
    of one sequence as the contract has them, tail and memory before its first token."""
    qkv, log_decay, beta, taps, tail, memory = (
        np.asarray(array, np.float64) for array in (qkv, log_decay, beta, taps, tail, memory)
    )
    heads, key_dim, value_dim = memory.shape
    width, count = (qkv.shape[1] - heads * value_dim) // 2, taps.shape[1]
    past = np.concatenate([tail, qkv])
    out, tails, memories = [], [], []
    for t in range(len(qkv)):
        summed = (past[t : t + count].T * taps).sum(axis=1)
        mixed = summed / (1 + np.exp(-summed))
        q, k = (mixed[i * width : (i + 1) * width].reshape(-1, key_dim) for i in (0, 1))
        q, k = (x / np.sqrt((x * x).sum(axis=1, keepdims=True) + 1e-6) for x in (q, k))
        v = mixed[2 * width :].reshape(heads, value_dim)
        result = np.empty_like(v)
        memory = memory.copy()
        for h in range(heads):
            of_key = h % len(q) if tiled else h * len(q) // heads
            memory[h] *= np.exp(log_decay[t, h])
            memory[h] += np.outer(k[of_key], beta[t, h] * (v[h] - k[of_key] @ memory[h]))
            result[h] = q[of_key] @ memory[h] / np.sqrt(key_dim)
        out.append(result)
        tails.append(past[t + 1 : t + count])
        memories.append(memory)
    return np.stack(out), np.stack(tails), np.stack(memories)
