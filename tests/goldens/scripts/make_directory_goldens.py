"""Golden logits and greedy tokens of the tiny checkpoint directories, from transformers.

transformers loads each directory as a user would have it load; of a packed one a copy with the float32 matrices that the
packing stands for (of MXFP4 transformers unpacks them). Of this project it uses only the generator of the directories. torch,
transformers and safetensors are needed here and nowhere in the tests.

    PYTHONPATH=tests python tests/goldens/scripts/make_directory_goldens.py SCRATCH [NAME ...]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from make_model_goldens import golden
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from support.goldens import directory_cases as cases
from support.goldens import tiny_directories as tiny

torch.set_num_threads(1)


def build(spec: tiny.Spec, path: Path) -> torch.nn.Module:
    """The model in float32 with eager attention and experts."""
    if spec.packing:
        path = path.with_name(path.name + "-dense")
        path.mkdir(exist_ok=True)
        matrices = mxfp4(spec) if spec.packing.method == "mxfp4" else tiny.dense(spec)
        entries = [(name, "F32", values.shape, tiny.to_bytes(values, "F32")) for name, values in matrices]
        (path / "model.safetensors").write_bytes(tiny.safetensors(entries))
        (path / "config.json").write_text(json.dumps(tiny.config_json(dataclasses.replace(spec, packing=None))))
    extra = {"experts_implementation": "eager"} if spec.experts else {}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **extra
    )
    ministral = "layer_types" in spec.config and spec.model_class == "MistralForCausalLM"  # so AutoModel
    assert type(model).__name__ == ("MinistralForCausalLM" if ministral else spec.model_class)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval()


def mxfp4(spec: tiny.Spec) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in float32, those of MXFP4 unpacked by transformers."""
    kept = {name: (values, dtype) for name, values, dtype in tiny.tensors(spec)}
    for name, (values, dtype) in kept.items():
        if dtype != "U8":
            yield name, tiny.from_bytes(tiny.to_bytes(values, dtype), dtype).reshape(values.shape)
        elif name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            blocks, scales = (torch.from_numpy(kept[stem + suffix][0]) for suffix in ("_blocks", "_scales"))
            yield stem, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()


def main() -> None:
    """Command line."""
    scratch, names = Path(sys.argv[1]), sys.argv[2:]
    for spec in cases.CASES:
        if names and spec.name not in names:
            continue
        digest = tiny.write(spec, scratch / spec.name)
        arrays = golden(build(spec, scratch / spec.name), spec.vocab)
        np.savez_compressed(cases.HERE / f"{spec.name}.npz", digest=np.array(digest), **arrays)
        gap = min(arrays[f"gaps{i}"].min() for i in range(3))
        print(f"{spec.name}: spread {arrays['rows2'].std():.2f}, smallest gap {gap:.4f}", flush=True)


if __name__ == "__main__":
    main()
