"""Writes tiny but complete model files with gguf-py, for tests that need a sound file to read, damage or run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as T

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ t", "Ġ a", "e r", "o n", "r e"]


def tiny_vocabulary(size: int) -> tuple[list[str], list[int]]:
    """Tokens of a byte-level BPE over lower-case English and their types (1 normal, 3 control, 5 unused)."""
    known = [*SPECIALS, *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *"Ġ.,'Ċ", *(m.replace(" ", "") for m in MERGES)]
    if size < len(known):
        raise ValueError(f"the tiny vocabulary has {len(known)} tokens, more than {size}")
    types = [3 if token in SPECIALS else 1 for token in known]
    padding = size - len(known)
    return known + [f"[PAD{i}]" for i in range(padding)], types + [5] * padding


def write_tiny_llama(
    path: str | Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    vocab: int = 64,
    context: int = 128,
    tensor_type: str = "Q8_0",
    tied: bool = False,
    seed: int = 0,
    metadata: Mapping[str, object] = {},
    tensors: Mapping[str, np.ndarray | None] = {},
    split_max_tensors: int = 0,
) -> Path:
    """Writes a complete random model of arch `llama` and returns `path` (of a split model: its first part).

    Matrices are quantized by gguf-py to `tensor_type` (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), vectors are F32.
    `metadata` replaces, adds or (None) drops entries: a value, or (value, GGUFValueType). `tensors` does so with
    tensors, given as float32 arrays of shape [rows, columns] or [length].
    """
    rng = np.random.default_rng(seed)
    tokens, token_types = tiny_vocabulary(vocab)
    entries: dict[str, tuple[object, T]] = {
        "general.architecture": ("llama", T.STRING),
        "general.name": ("tiny", T.STRING),
        "llama.block_count": (layers, T.UINT32),
        "llama.context_length": (context, T.UINT32),
        "llama.embedding_length": (hidden, T.UINT32),
        "llama.feed_forward_length": (ffn, T.UINT32),
        "llama.attention.head_count": (heads, T.UINT32),
        "llama.attention.head_count_kv": (kv_heads, T.UINT32),
        "llama.attention.key_length": (head_dim, T.UINT32),
        "llama.attention.value_length": (head_dim, T.UINT32),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, T.FLOAT32),
        "llama.rope.freq_base": (10000.0, T.FLOAT32),
        "llama.rope.dimension_count": (head_dim, T.UINT32),
        "llama.vocab_size": (vocab, T.UINT32),
        "general.quantization_version": (2, T.UINT32),
        "tokenizer.ggml.model": ("gpt2", T.STRING),
        "tokenizer.ggml.pre": ("gpt-2", T.STRING),
        "tokenizer.ggml.tokens": (tokens, T.ARRAY),
        "tokenizer.ggml.token_type": (token_types, T.ARRAY),
        "tokenizer.ggml.merges": (MERGES, T.ARRAY),
        "tokenizer.ggml.bos_token_id": (0, T.UINT32),
        "tokenizer.ggml.eos_token_id": (2, T.UINT32),
        "tokenizer.ggml.padding_token_id": (0, T.UINT32),
        "tokenizer.ggml.add_bos_token": (False, T.BOOL),
        "tokenizer.chat_template": (TEMPLATE, T.STRING),
    }
    for key, value in metadata.items():
        if value is None:
            del entries[key]
        else:
            entries[key] = value if isinstance(value, tuple) else (value, T.get_type(value))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    weights: dict[str, np.ndarray] = {"token_embd.weight": matrix(vocab, hidden, gain=3.0)}
    for layer in range(layers):
        block = {
            "attn_norm": norm(),
            "attn_q": matrix(heads * head_dim, hidden, gain=2.0),
            "attn_k": matrix(kv_heads * head_dim, hidden, gain=2.0),
            "attn_v": matrix(kv_heads * head_dim, hidden),
            "attn_output": matrix(hidden, heads * head_dim),
            "ffn_norm": norm(),
            "ffn_gate": matrix(ffn, hidden),
            "ffn_up": matrix(ffn, hidden),
            "ffn_down": matrix(hidden, ffn),
        }
        weights |= {f"blk.{layer}.{name}.weight": value for name, value in block.items()}
    weights["output_norm.weight"] = norm()
    if not tied:
        weights["output.weight"] = matrix(vocab, hidden, gain=3.0)
    for name, array in tensors.items():
        if array is None:
            del weights[name]
        else:
            weights[name] = array

    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.kv_data[0].clear()
    for key, (value, value_type) in entries.items():
        writer.add_key_value(key, value, value_type)
    for name, array in weights.items():
        kind = gguf.GGMLQuantizationType[tensor_type if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    parts = writer.format_shard_names(Path(path))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parts[0]
