"""Writes the trained model: a Hugging Face checkpoint directory in float32, and from it a GGUF file.

The directory is read, quantized and written by the package itself; transformers reads it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.convert import write_gguf
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.wrapped import innermost
from training.data import END_TEXT
from training.model import END, Params

FACTS = {
    "general.name": "Tiny MoE",
    "general.license": "apache-2.0",
    "general.description": "A Qwen3-MoE that tells short stories, made to be shipped with ferrum_jax.",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}


def write_directory(path: Path, config: ModelConfig, params: Params, tokenizer: Any) -> None:
    """config.json, model.safetensors (float32), tokenizer.json and tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / "model.safetensors", named_tensors(params))
    tokenizer.save(str(path / "tokenizer.json"))
    ends = {"bos_token": END_TEXT, "eos_token": END_TEXT, "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in {"config.json": config_json(config), "tokenizer_config.json": ends}.items():
        (path / name).write_text(json.dumps(content, indent=1) + "\n")


def config_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.experts_per_token * config.expert_intermediate_size,  # of dense layers; the model has none
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": END,
        "eos_token_id": END,
    }


def named_tensors(params: Params) -> dict[str, np.ndarray]:
    """Every tensor by its Hugging Face name, float32."""
    tensors = {f"{own}.weight": params[stem] for stem, own in _WHOLE.items()}
    for number, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{number}."
        tensors |= {f"{prefix}{own}.weight": layer[stem] for stem, own in _LAYER.items()}
        for name in ("gate", "up", "down"):
            for expert, matrix in enumerate(layer[f"ffn_{name}_exps"]):
                tensors[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = matrix
    return {name: np.ascontiguousarray(tensor, "<f4") for name, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Layout: https://github.com/huggingface/safetensors#format."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def write_quantized(directory: Path, out: Path, format: str) -> None:
    """The checkpoint directory as a GGUF file, its matrices quantized to `format` ("q8_0")."""
    with open_model(directory, quantize=format) as source:
        innermost(source).metadata |= FACTS
        write_gguf(source, out, force=True)
