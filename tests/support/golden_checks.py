"""What a model must give of its goldens in tests/goldens, which code that shares nothing with this package made."""

from __future__ import annotations

from typing import Any

import numpy as np

import ferrum_jax as fj
from support.goldens import golden_cases

LARGEST = 1e-3  # of any logit
RMS = 1e-4  # over a prompt's rows; float32 noise gives 1e-6 to 2e-5, a wrong eps 1e-3 and more
PROJECTED = 5e-4  # every row on fixed random directions
TIE = 2e-3  # if the two best logits are closer, the next greedy token may be either


def check_logits(model: Any, golden: dict[str, np.ndarray], prompts: list[list[int]]) -> None:
    """Some whole rows of logits of each prompt, and all rows on random directions."""
    vocab = golden["rows0"].shape[1]
    for i, (ids, full) in enumerate(zip(prompts, model.logits(prompts), strict=True)):
        assert full.shape == (len(ids), vocab) and full.dtype == np.float32
        error = np.abs(full[golden_cases.kept_rows(len(ids))] - golden[f"rows{i}"])
        assert error.max() <= LARGEST, f"{len(ids)} tokens"
        assert np.sqrt(np.mean(error**2)) <= RMS, f"{len(ids)} tokens"
        projected = full.astype(np.float64) @ golden_cases.projection(vocab)
        assert np.abs(projected - golden[f"proj{i}"]).max() <= PROJECTED, f"{len(ids)} tokens"


def check_greedy(model: Any, golden: dict[str, np.ndarray], prompts: list[list[int]]) -> None:
    """The greedy continuation of each prompt, up to the first near tie."""
    params = fj.SamplingParams(temperature=0.0, max_tokens=golden_cases.NEW_TOKENS, ignore_eos=True)
    for i, completion in enumerate(model.generate(prompts, params)):
        expected = golden[f"tokens{i}"]
        assert len(completion.token_ids) == len(expected) and completion.finish_reason == "length"
        different = np.flatnonzero(np.array(completion.token_ids) != expected)
        if different.size:
            assert golden[f"gaps{i}"][different[0]] < TIE, f"prompt {i}: token {different[0]} differs and is no near tie"
