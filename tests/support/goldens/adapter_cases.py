"""The committed cases of LoRA adapters. Each has `<name>.npz` in tests/goldens/adapters, made by make_adapter_goldens.py;
adapters and their models are rebuilt from their `Spec` when the tests run."""

from __future__ import annotations

from support import GOLDENS
from support.goldens.tiny_adapters import ATTENTION, DENSE, Spec
from support.goldens.tiny_directories import Spec as Base

HERE = GOLDENS / "adapters"

SMALL = {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 256, "ff": 512}
LLAMA = Base("llama-f32", "LlamaForCausalLM", "F32", **SMALL, seed=71)
TWO = {**SMALL, "layers": 2}
HALVED = Base("llama-bf16", "LlamaForCausalLM", "BF16", **TWO, seed=72)
QWEN2 = Base("qwen2-f16", "Qwen2ForCausalLM", "F16", **TWO, config={"head_dim": None}, seed=73)
QWEN3 = Base("qwen3-bf16", "Qwen3ForCausalLM", "BF16", **{**TWO, "head_dim": 128}, tied=True, seed=74)
MOE = Base("qwen3moe-f32", "Qwen3MoeForCausalLM", "F32", **TWO, experts=8, top_k=3, expert_ff=128, dense=(1,), seed=75,
           config={"norm_topk_prob": True, "mlp_only_layers": [1]})  # fmt: skip
OSS = Base("gpt-oss-f32", "GptOssForCausalLM", "F32", **TWO, experts=8, top_k=3, expert_ff=128, seed=76)
CASES = [
    Spec("llama-all", LLAMA, seed=1),
    Spec("llama-patterns", LLAMA, (*ATTENTION, "down_proj"), rank=4, alpha=4, seed=2,
         rank_pattern={"^model.layers.1.self_attn.q_proj": 12, "k_proj": 2, "layers.2.mlp.down_proj": 6},
         alpha_pattern={"q_proj": 24, "layers.0.self_attn.q_proj": 9.5, "^v_proj": 100}),
    Spec("llama-some-rslora", LLAMA, ("q_proj", "down_proj"), (0, 2), rank=16, rslora=True, dtype="BF16", seed=3),
    Spec("llama-bf16-base", HALVED, ATTENTION, rank=4, alpha=32, dtype="F16", old=True, seed=4),
    Spec("qwen2", QWEN2, rank=6, dtype="F16", seed=5),
    Spec("qwen3", QWEN3, rank=2, alpha=1, dtype="BF16", seed=6),
    Spec("qwen3moe-attention", MOE, ATTENTION, seed=7),
    Spec("gpt-oss-attention", OSS, ATTENTION, seed=10),
    Spec("qwen3moe-dense", MOE, ("q_proj", *DENSE), (1,), rank=3, alpha=7, seed=8),
]  # fmt: skip
# llama-file.gguf is what convert_lora_to_gguf.py of llama.cpp (in llama-cpp-python 0.3.36) makes of it:
#     python convert_lora_to_gguf.py --base BASE --outfile llama-file.gguf ADAPTER
FILE = Spec("llama-file", LLAMA, ("q_proj", "k_proj", "down_proj"), (1,), rank=2, alpha=3, seed=11)
EXTRA = {  # without goldens: they are loaded next to those that have some
    base.name: Spec(f"extra-{base.name}", base, ("k_proj", "o_proj"), rank=5, alpha=5, seed=9)
    for base in (HALVED, QWEN2, QWEN3, OSS)
}
