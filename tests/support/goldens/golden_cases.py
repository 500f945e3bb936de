"""The committed cases: which tiny models there are, and which of their numbers are kept.

Files are rebuilt from their `Spec` when the tests run; those that llama.cpp quantized are committed, because no Python
quantizer makes K-quants. Each case has `<name>.npz` in tests/goldens/models, made by scripts/make_model_goldens.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from support import GOLDENS
from support.goldens.tiny_models import Spec, raw

HERE = GOLDENS / "models"

NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """`quantized`: llama.cpp's name of the mix in the committed file; `gradient`: has a golden of gradients too; `lengths`: of
    the prompts."""

    spec: Spec
    quantized: str = ""
    gradient: bool = False
    lengths: tuple[int, ...] = (1, 17, 130)

    @property
    def name(self) -> str:
        """The name of the case and of its files."""
        return self.spec.name


SMALL = {"layers": 2, "heads": 4, "kv_heads": 1, "head_dim": 128}
NARROW = {"layers": 2, "hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "ff": 160}
MOE = {"experts": 16, "top_k": 4, "expert_ff": 256, "ff": 768, "eps": 1e-6, "theta": 1e6}
# What llama.cpp's Q4_K_M does: attention's values and the down matrices in Q6_K on some of the layers.
MIX = {"*": ("Q4_K",), "v": ("Q6_K", "Q4_K"), "down": ("Q6_K", "Q4_K"), "embd": ("Q4_K",), "output": ("Q6_K",)}
ALL_I = {
    "embd": ("IQ3_S",),
    "output": ("IQ4_NL",),
    "q": ("IQ2_XXS", "IQ2_XS", "IQ2_S"),
    "k": ("IQ3_XXS", "IQ1_M", "IQ4_XS"),
    "v": ("IQ4_NL", "IQ3_S", "IQ3_XXS"),
    "o": ("IQ4_XS", "IQ4_NL", "IQ2_XXS"),
    "gate": ("IQ1_S", "IQ1_M", "IQ3_S"),
    "up": ("IQ2_S", "IQ4_XS", "IQ1_S"),
    "down": ("IQ3_S", "IQ2_XS", "IQ4_XS"),
}
ODD = {
    "*": ("Q2_K", "Q3_K", "Q5_K"),
    "embd": ("TQ1_0",),
    "gate": ("MXFP4", "NVFP4", "TQ2_0"),
    "down": ("IQ2_XS", "MXFP4", "Q5_K"),
}
OSS = {"experts": 8, "top_k": 3, "expert_ff": 128, "attention_bias": True, "window": 24, "theta": 150000.0, "context": 4096,
       "rope": ("yarn", 8.0, 512)}  # fmt: skip
EXPERTS = {"gate": ("MXFP4",), "up": ("MXFP4",), "down": ("MXFP4",)}
CASES = [
    Case(Spec("llama3-f32", "llama", rope=("llama3", 8.0, 64), seed=11), gradient=True),
    Case(Spec("mistral-f16", "llama", window=24, tied=True, theta=1e6, formats={"*": ("F16",)}, seed=12)),
    Case(Spec("llama-linear-q4_1", "llama", rope=("linear", 4.0, 128), formats={"*": ("Q4_1",)}, seed=13)),
    Case(Spec("qwen2-yarn-q5_1", "qwen2", heads=4, rope=("yarn", 4.0, 64), formats={"*": ("Q5_1",)}, seed=14)),
    Case(Spec("qwen2-tied-bf16", "qwen2", heads=4, tied=True, eps=1e-6, theta=1e6, formats={"*": ("BF16",)}, seed=15)),
    Case(Spec("gpt-oss-f32", "gpt-oss", **OSS, seed=27)),
    Case(Spec("gpt-oss-q8_0", "gpt-oss", **{**OSS, "layers": 4}, formats={"*": ("Q8_0",)}, seed=28)),
    Case(Spec("gpt-oss-mxfp4", "gpt-oss", **OSS, formats={"*": ("Q8_0",), **EXPERTS}, seed=29), lengths=(1, 17, 130, 1000)),
    Case(Spec("qwen3-q8_0", "qwen3", tied=True, eps=1e-6, theta=1e6, formats={"*": ("Q8_0",)}, seed=16)),
    Case(Spec("mixtral-q4_0", "llama", layers=2, experts=8, top_k=2, theta=1e6, formats={"*": ("Q4_0",)}, seed=17)),
    Case(Spec("qwen3moe-f32", "qwen3moe", layers=2, **MOE, seed=18), gradient=True),
    Case(Spec("qwen3moe-q4_k_m", "qwen3moe", layers=4, **MOE, formats=MIX, seed=19)),
    Case(Spec("llama-all-i", "llama", formats=ALL_I, seed=20)),
    Case(Spec("qwen3moe-odd", "qwen3moe", **MOE, formats=ODD, seed=21)),
    Case(Spec("llama-q5_k_m", "llama", **SMALL, ff=256, seed=22), "Q5_K_M"),
    Case(Spec("qwen2-iq4_xs", "qwen2", layers=2, heads=4, kv_heads=1, ff=256, seed=23), "IQ4_XS"),
    Case(Spec("qwen3-q3_k_m", "qwen3", **SMALL, ff=256, seed=24), "Q3_K_M"),
    Case(Spec("qwen2-narrow-q4_k_m", "qwen2", **NARROW, seed=25), "Q4_K_M"),
    Case(Spec("qwen3moe-q2_k", "qwen3moe", **SMALL, **{**MOE, "experts": 8}, seed=26), "Q2_K"),
]


def kept_rows(length: int) -> list[int]:
    """Positions whose logits are kept whole: the ends and a few between."""
    return sorted({0, length // 4, length // 2, 3 * length // 4, length - 2 if length > 1 else 0, length - 1})


def projection(vocab: int, count: int = 6) -> np.ndarray:
    """float64 [vocab, count]: random signs of unit length; every row of logits is kept as its products with them."""
    signs = raw(5, "projection", vocab * count) & np.uint64(1)
    return (signs.astype(np.float64) * 2 - 1).reshape(vocab, count) / np.sqrt(vocab)


def probe_ids(vocab: int) -> np.ndarray:
    """int64 [64]: token ids whose logits are kept in the goldens of real models, besides the 50 best."""
    return (raw(6, "probe", 64) % np.uint64(vocab)).astype(np.int64)
