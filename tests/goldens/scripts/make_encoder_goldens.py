"""Golden embeddings of the tiny encoders and of MiniLM, from transformers in float32, a text at a time.

    PYTHONPATH=tests python tests/goldens/scripts/make_encoder_goldens.py SCRATCH [MINILM]

MINILM is the unpacked directory of all-MiniLM-L6-v2; torch and transformers are needed here and nowhere in the tests. Of this
project it uses only the generator of the tiny encoders.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from support import GOLDENS
from support.goldens import tiny_encoders as tiny

torch.set_num_threads(1)


def golden(path: Path, texts: list[str], pooling: str, length: int) -> dict[str, np.ndarray]:
    """`ids<i>` of each text cut to `length` tokens, and `vectors` float32 [texts, hidden] of Euclidean length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model, report = transformers.AutoModel.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == "BertModel" and not report["missing_keys"] and not report["mismatched_keys"], report
    arrays, vectors = {}, []
    for i, text in enumerate(texts):
        encoded = tokenizer(text, truncation=True, max_length=length, padding=False, return_tensors="pt")
        arrays[f"ids{i}"] = encoded["input_ids"][0].numpy().astype(np.int32)
        with torch.no_grad():
            hidden = model.eval()(**encoded).last_hidden_state[0].double()
        pooled = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
        vectors.append((pooled / pooled.norm()).float().numpy())
    return {**arrays, "vectors": np.stack(vectors)}


def main() -> None:
    """Command line."""
    scratch = Path(sys.argv[1])
    for spec in tiny.CASES:
        digest = tiny.write_directory(spec, scratch / spec.name)
        arrays = golden(scratch / spec.name, tiny.TEXTS, spec.pooling, spec.text_length or spec.context)
        np.savez_compressed(tiny.HERE / f"{spec.name}.npz", digest=np.array(digest), **arrays)
        cosines = arrays["vectors"] @ arrays["vectors"].T
        print(spec.name, [len(arrays[f"ids{i}"]) for i in range(len(tiny.TEXTS))], f"smallest cosine {cosines.min():.3f}")
    if len(sys.argv) > 2:
        prose = (GOLDENS / "real" / "text.txt").read_text(encoding="utf-8")
        texts = [*tiny.TEXTS, *(prose[i : i + 40 * (i // 400 + 1)] for i in range(0, 4000, 400))]
        np.savez_compressed(GOLDENS / "real" / "minilm.npz", **golden(Path(sys.argv[2]), texts, "mean", 256))


if __name__ == "__main__":
    main()
