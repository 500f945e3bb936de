"""The committed cases of checkpoint directories. Each has `<name>.npz` in
tests/goldens/directories, made by make_directory_goldens.py; the directories are rebuilt from their `Spec` when the tests
run."""

from __future__ import annotations

from support import GOLDENS
from support.goldens.tiny_directories import Packing, Spec

HERE = GOLDENS / "directories"

SMALL = {"layers": 2, "heads": 4, "kv_heads": 1}
MOE = {"experts": 8, "top_k": 3, "expert_ff": 128, **SMALL}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    Spec("llama3-bf16", "LlamaForCausalLM", shards=3, seed=41,
         config={"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}),
    Spec("llama-bias-linear-f16", "LlamaForCausalLM", "F16", tied=True, seed=42,
         config={"attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    Spec("mistral-f32", "MistralForCausalLM", "F32", seed=43, config={"sliding_window": 24, "rope_theta": 1e6}),
    Spec("qwen2-yarn-bf16", "Qwen2ForCausalLM", heads=4, seed=44,
         config={"head_dim": None, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                 "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
    Spec("qwen2-window-f16", "Qwen2ForCausalLM", "F16", heads=4, layers=2, seed=45,
         config={"head_dim": None, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}),
    Spec("qwen3-f16", "Qwen3ForCausalLM", "F16", tied=True, seed=46, config={"rms_norm_eps": 1e-6, "rope_theta": 1e6}),
    Spec("qwen3-new-keys-bias", "Qwen3ForCausalLM", seed=47,
         config={"attention_bias": True, "rope_theta": None, "torch_dtype": None, "dtype": "bfloat16",
                 "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 2.0, "beta_fast": 16.0,
                                     "original_max_position_embeddings": 128, "attention_factor": 1.2}}),
    Spec("qwen3moe-mixed-bf16", "Qwen3MoeForCausalLM", **{**MOE, "layers": 6}, dense=(0, 2, 3, 4), shards=2, seed=48,
         config={"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}),
    Spec("qwen3moe-f32", "Qwen3MoeForCausalLM", "F32", **MOE, fused=True, seed=49,
         config={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": True,
                 "sliding_window": 40, "max_window_layers": 28}),
    Spec("mixtral-bf16", "MixtralForCausalLM", **MOE, seed=50, config={"sliding_window": None}),
    Spec("qwen3moe-other-keys", "Qwen3MoeForCausalLM", **MOE, seed=61,
         config={"norm_topk_prob": True, "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 64,
                 "activation": "gelu", "logit_scale": 0.5, "attn_logit_softcapping": 5.0, "num_local_experts": 8,
                 "dual_chunk_attention_config": {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 32}}),
    Spec("mistral-yarn-outside", "MistralForCausalLM", "F16", **SMALL, seed=62,
         config={"sliding_window": None, "original_max_position_embeddings": 64,
                 "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "finetuned": True},
                 "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    Spec("llama-not-tied", "LlamaForCausalLM", **SMALL, shards=2, seed=63, config={"tie_word_embeddings": True}),
    Spec("qwen2-window-later", "Qwen2ForCausalLM", heads=4, layers=4, seed=64,
         config={"head_dim": None, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    Spec("qwen3-window-kinds", "Qwen3ForCausalLM", "F16", heads=4, layers=3, seed=65,
         config={"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    Spec("mistral-window-kinds", "MistralForCausalLM", heads=4, layers=4, seed=66,
         config={"sliding_window": 16,
                 "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
    Spec("gpt-oss-bf16", "GptOssForCausalLM", **MOE, seed=67),
    Spec("gpt-oss-f32", "GptOssForCausalLM", "F32", **{**MOE, "layers": 3}, seed=68,
         config={"layer_types": ["full_attention", "full_attention", "sliding_attention"], "swiglu_limit": 5.0,
                 "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}),
    Spec("gpt-oss-mxfp4", "GptOssForCausalLM", **MOE, packing=Packing("mxfp4"), seed=69),
    Spec("gptq-llama", "LlamaForCausalLM", "F16", **SMALL, packing=Packing("gptq", 4, 128, own_file=True), seed=51),
    Spec("gptq-asym-ordered", "Qwen2ForCausalLM", "F16", **SMALL, seed=52, config={"head_dim": None},
         packing=Packing("gptq", 4, 32, symmetric=False, ordered=True)),
    Spec("gptq8-qwen3", "Qwen3ForCausalLM", "F16", **SMALL, packing=Packing("gptq_v2", 8, -1), seed=53),
    Spec("gptq8-asym-moe", "Qwen3MoeForCausalLM", "F16", **MOE, seed=54, config={"norm_topk_prob": True},
         packing=Packing("gptq_v2", 8, 64, symmetric=False)),
    Spec("gptq-ordered-moe", "Qwen3MoeForCausalLM", "BF16", **MOE, seed=55, config={"norm_topk_prob": True},
         packing=Packing("gptq", 4, 64, ordered=True)),
    Spec("awq-llama", "LlamaForCausalLM", "F16", **SMALL, packing=Packing("awq", 4, 128, symmetric=False), seed=56),
    Spec("awq-mixtral", "MixtralForCausalLM", "F16", **MOE, packing=Packing("awq", 4, 64, symmetric=False), seed=57),
    Spec("compressed-qwen3", "Qwen3ForCausalLM", **SMALL, packing=Packing("compressed-tensors", scales="BF16"), seed=58),
    Spec("compressed-asym", "LlamaForCausalLM", "F16", **SMALL, seed=59,
         packing=Packing("compressed-tensors", 4, 32, symmetric=False, ordered=True)),
    Spec("compressed-channel-moe", "Qwen3MoeForCausalLM", **MOE, seed=60, config={"norm_topk_prob": True},
         packing=Packing("compressed-tensors", 8, -1, scales="F32")),
]  # fmt: skip
