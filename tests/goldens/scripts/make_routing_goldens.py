"""Golden choices of experts of some tiny checkpoint directories, from the routers of transformers.

    PYTHONPATH=tests python tests/goldens/scripts/make_routing_goldens.py SCRATCH

writes routing.npz next to the other goldens: for each case what its routers gave for the prompt of 17 tokens, ids and weights
[layers with experts, tokens, top_k].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from make_directory_goldens import build, cases, tiny
from make_model_goldens import tiny_models

NAMES = ("qwen3moe-mixed-bf16", "qwen3moe-f32", "mixtral-bf16")
NEAR = 1e-4  # of two probabilities that must not decide who is chosen


@torch.no_grad()
def routing(model: torch.nn.Module, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What every router returned, first layer first."""
    given = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, inputs, output: given.append(output))
    model(torch.tensor([ids]), use_cache=False)
    for logits, _, chosen in given:
        best = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True).values[:, : chosen.shape[1] + 1]
        assert (best[:, :-1] - best[:, 1:]).min() > NEAR, "a near tie; change the seed"
    return tuple(torch.stack([output[part] for output in given]).numpy() for part in (2, 1))


def main() -> None:
    """Command line."""
    arrays = {}
    for spec in cases.CASES:
        if spec.name in NAMES:
            path = Path(sys.argv[1]) / spec.name
            digest = tiny.write(spec, path)
            ids, weights = routing(build(spec, path), tiny_models.prompts(spec.vocab)[1])
            arrays |= {f"{spec.name} ids": ids.astype(np.int32), f"{spec.name} weights": weights, f"{spec.name} digest": digest}
            print(spec.name, ids.shape)
    np.savez_compressed(cases.HERE / "routing.npz", **arrays)


if __name__ == "__main__":
    main()
