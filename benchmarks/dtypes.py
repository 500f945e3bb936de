"""What a dtype costs in perplexity, on real models and one text, in windows of 512 tokens.

    python -m benchmarks.dtypes smollm2:135m qwen2.5-coder-0.5b=PATH.gguf

A model is NAME=SOURCE, or a source alone. The check is transformers' perplexity of the same windows on exactly dequantized
weights, from tests/goldens/real, for the models whose token ids of the text are the same there.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import ferrum_jax as fj
from benchmarks import common
from ferrum_jax import hub

DTYPES = ("float32", "bfloat16", "float16", "int8")
WINDOW = 512


def reference(ids: list[int]) -> float | None:
    """transformers' perplexity of these ids, where a golden file holds them."""
    for path in sorted(common.TEXT.parent.glob("*.npz")):
        with np.load(path) as golden:
            if "text" in golden and golden["text"].tolist() == ids:
                return float(golden["perplexity512"])
    return None


def measure(name: str, source: str) -> dict[str, Any]:
    path = hub.resolve(source)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        model = fj.load(path, dtype=dtype)
        ids = model.tokenizer.encode(common.TEXT.read_text(), add_special=False)
        begin = time.perf_counter()
        value = model.perplexity(ids, window=WINDOW)
        print(f"{name} {dtype}: {value:.5f} in {time.perf_counter() - begin:.1f} s", flush=True)
        if not np.isfinite(value):
            raise RuntimeError(f"{name} {dtype}: perplexity is {value}")
        rows.append({"dtype": dtype, "perplexity": round(value, 5)})
    exact = rows[0]["perplexity"]
    for row in rows:
        row["change_percent"] = round(100 * (row["perplexity"] / exact - 1), 4)
    expected = reference(ids)
    scored = len(ids) // WINDOW * (WINDOW - 1)
    difference = None if expected is None else round(100 * (exact / expected - 1), 5)
    found = {"transformers": None if expected is None else round(expected, 5), "float32_difference_percent": difference}
    return {"model": name, "scored_tokens": scored, "rows": rows, "content_check": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2:135m"])
    options = parser.parse_args()
    pairs = [(name, source or name) for name, _, source in (model.partition("=") for model in options.models)]
    common.write("dtypes", {"window": WINDOW, "models": [measure(name, source) for name, source in pairs]})


if __name__ == "__main__":
    main()
