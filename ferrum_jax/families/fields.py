"""Keys of config.json that can change what transformers 5.24.0 computes, by model_type; any other key changes nothing.

Written by tests/goldens/scripts/make_config_fields.py.
"""

# fmt: off
_DECODERS = {
    "attention_chunk_size", "head_dim", "hidden_size", "is_causal", "is_encoder_decoder", "kv_sharing_modes", "layer_types",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "partial_rotary_factor", "per_layer_config", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
}
FIELDS = {
    "bert": {
        "add_cross_attention", "hidden_act", "hidden_size", "intermediate_size", "is_decoder", "is_encoder_decoder",
        "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "tie_word_embeddings",
        "type_vocab_size", "vocab_size",
    },
    "deepseek_v2": _DECODERS | {
        "attention_bias", "first_k_dense_replace", "hidden_act", "intermediate_size", "kv_lora_rank", "mlp_bias",
        "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts",
        "num_experts_per_tok", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps", "routed_scaling_factor",
        "topk_group", "topk_method", "v_head_dim",
    },
    "deepseek_v3": _DECODERS | {
        "attention_bias", "first_k_dense_replace", "hidden_act", "intermediate_size", "kv_lora_rank", "moe_intermediate_size",
        "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_local_experts",
        "num_mtp_layers", "num_nextn_predict_layers", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps",
        "rope_interleave", "routed_scaling_factor", "topk_group", "v_head_dim",
    },
    "gemma3": {
        "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id", "image_token_index",
        "is_encoder_decoder", "mm_tokens_per_image", "text_config", "tie_word_embeddings", "vision_config",
    },
    "gemma3_text": _DECODERS | {
        "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "intermediate_size",
        "query_pre_attn_scalar", "rms_norm_eps", "rope_local_base_freq", "sliding_window_pattern",
        "use_bidirectional_attention",
    },
    "gemma4": {
        "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_index", "eoi_token_id", "image_token_id",
        "is_encoder_decoder", "text_config", "tie_word_embeddings", "video_token_id", "vision_config",
    },
    "gemma4_text": _DECODERS | {
        "attention_bias", "attention_k_eq_v", "enable_moe_block", "final_logit_softcapping", "global_head_dim",
        "hidden_activation", "hidden_size_per_layer_input", "intermediate_size", "moe_intermediate_size", "num_experts",
        "num_global_key_value_heads", "num_kv_shared_layers", "rms_norm_eps", "top_k_experts", "use_bidirectional_attention",
        "use_double_wide_mlp", "vocab_size_per_layer_input",
    },
    "glm4_moe": _DECODERS | {
        "attention_bias", "first_k_dense_replace", "hidden_act", "intermediate_size", "moe_intermediate_size", "n_group",
        "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_local_experts",
        "num_mtp_layers", "num_nextn_predict_layers", "rms_norm_eps", "routed_scaling_factor", "topk_group", "use_qk_norm",
    },
    "glm4_moe_lite": _DECODERS | {
        "attention_bias", "hidden_act", "intermediate_size", "kv_lora_rank", "mlp_layer_types", "moe_intermediate_size",
        "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_local_experts",
        "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps", "rope_interleave", "routed_scaling_factor",
        "topk_group", "v_head_dim",
    },
    "gpt_oss": _DECODERS | {
        "attention_bias", "hidden_act", "intermediate_size", "num_experts", "num_experts_per_tok", "num_local_experts",
        "rms_norm_eps", "swiglu_alpha", "swiglu_limit",
    },
    "lfm2": _DECODERS | {
        "block_auto_adjust_ff_dim", "block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "conv_L_cache",
        "conv_bias", "full_attn_idxs", "intermediate_size", "norm_eps", "tie_embedding",
    },
    "lfm2_moe": _DECODERS | {
        "conv_L_cache", "conv_bias", "intermediate_size", "moe_intermediate_size", "norm_eps", "norm_topk_prob",
        "num_dense_layers", "num_experts", "num_experts_per_tok", "routed_scaling_factor", "tie_embedding", "use_expert_bias",
    },
    "llama": _DECODERS | {
        "attention_bias", "hidden_act", "intermediate_size", "mlp_bias", "rms_norm_eps",
    },
    "mistral": _DECODERS | {
        "hidden_act", "intermediate_size", "rms_norm_eps",
    },
    "mixtral": _DECODERS | {
        "hidden_act", "intermediate_size", "num_experts", "num_experts_per_tok", "num_local_experts", "rms_norm_eps",
    },
    "qwen2": _DECODERS | {
        "hidden_act", "intermediate_size", "max_window_layers", "rms_norm_eps", "use_sliding_window",
    },
    "qwen3": _DECODERS | {
        "attention_bias", "hidden_act", "intermediate_size", "max_window_layers", "rms_norm_eps", "use_sliding_window",
    },
    "qwen3_5": {
        "image_token_id", "is_encoder_decoder", "text_config", "tie_word_embeddings", "video_token_id", "vision_config",
        "vision_end_token_id", "vision_start_token_id",
    },
    "qwen3_5_moe": {
        "image_token_id", "is_encoder_decoder", "text_config", "tie_word_embeddings", "video_token_id", "vision_config",
        "vision_end_token_id", "vision_start_token_id",
    },
    "qwen3_5_moe_text": _DECODERS | {
        "attention_bias", "full_attention_interval", "hidden_act", "linear_conv_kernel_dim", "linear_key_head_dim",
        "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "moe_intermediate_size", "num_experts",
        "num_experts_per_tok", "rms_norm_eps", "shared_expert_intermediate_size",
    },
    "qwen3_5_text": _DECODERS | {
        "attention_bias", "full_attention_interval", "hidden_act", "intermediate_size", "linear_conv_kernel_dim",
        "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "rms_norm_eps",
    },
    "qwen3_moe": _DECODERS | {
        "attention_bias", "decoder_sparse_step", "hidden_act", "intermediate_size", "mlp_only_layers",
        "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok", "num_local_experts", "rms_norm_eps",
        "use_sliding_window",
    },
    "qwen3_next": _DECODERS | {
        "attention_bias", "decoder_sparse_step", "full_attention_interval", "hidden_act", "intermediate_size",
        "linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads",
        "linear_value_head_dim", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts",
        "num_experts_per_tok", "rms_norm_eps", "shared_expert_intermediate_size",
    },
}
# Keys inside the object rope_scaling or rope_parameters.
ROPE_FIELDS = {
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
    "mrope_section", "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
    "rope_type", "short_factor", "truncate",
}
