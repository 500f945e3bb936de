"""Writes ferrum_jax/headers/qwen3-30b-a3b-q4_k_m.json: the header of Qwen3-30B-A3B as llama.cpp's Q4_K_M stores it.

    LLAMA_BINS=<directory of libllama> python tests/goldens/scripts/make_plan_header.py

The sizes are those of the model's config.json. Which tensor gets which type llama.cpp itself says: it quantizes a model
of the same architecture, layers and number of experts, but narrow and all zeros. Its shared library (the npm package
@node-llama-cpp/linux-x64 3.22.1 holds one) is called directly. Needs gguf and 3 GB of disk in the temporary directory.
"""

import ctypes as c
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

OUT = Path(__file__).parents[3] / "ferrum_jax" / "headers" / "qwen3-30b-a3b-q4_k_m.json"
Q4_K_M = 15  # llama.cpp's file type
ARCHITECTURE = "qwen3moe"
METADATA = {
    "general.architecture": ARCHITECTURE,
    "general.name": "Qwen3 30B A3B",
    "general.license": "apache-2.0",
    "general.file_type": Q4_K_M,
    "general.quantization_version": 2,
    "qwen3moe.block_count": 48,
    "qwen3moe.context_length": 40960,
    "qwen3moe.embedding_length": 2048,
    "qwen3moe.feed_forward_length": 6144,
    "qwen3moe.attention.head_count": 32,
    "qwen3moe.attention.head_count_kv": 4,
    "qwen3moe.attention.key_length": 128,
    "qwen3moe.attention.value_length": 128,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3moe.rope.freq_base": 1e6,
    "qwen3moe.expert_count": 128,
    "qwen3moe.expert_used_count": 8,
    "qwen3moe.expert_feed_forward_length": 768,
}
VOCABULARY = 151936
NARROW = {"qwen3moe.embedding_length": 256, "qwen3moe.expert_feed_forward_length": 256}
NARROW_VOCABULARY = 64


def shapes(metadata: dict, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor with its shape, slowest axis first, in the order of convert_hf_to_gguf.py."""
    key = {name.removeprefix(ARCHITECTURE + "."): value for name, value in metadata.items()}
    hidden, head = key["embedding_length"], key["attention.key_length"]
    queries, keys = key["attention.head_count"] * head, key["attention.head_count_kv"] * head
    experts, width = key["expert_count"], key["expert_feed_forward_length"]
    yield "output.weight", (vocabulary, hidden)
    yield "token_embd.weight", (vocabulary, hidden)
    for layer in range(key["block_count"]):
        for name, *shape in (
            ("attn_k_norm", head),
            ("attn_k", keys, hidden),
            ("attn_norm", hidden),
            ("attn_output", hidden, queries),
            ("attn_q_norm", head),
            ("attn_q", queries, hidden),
            ("attn_v", keys, hidden),
            ("ffn_down_exps", experts, hidden, width),
            ("ffn_gate_exps", experts, width, hidden),
            ("ffn_gate_inp", experts, hidden),
            ("ffn_norm", hidden),
            ("ffn_up_exps", experts, width, hidden),
        ):
            yield f"blk.{layer}.{name}.weight", tuple(shape)
    yield "output_norm.weight", (hidden,)


def write_zeros(path: Path, metadata: dict) -> None:
    """A model file of zeros, matrices in float16, norms and router in float32 as the converter writes them."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, value in metadata.items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([chr(0x21 + i) for i in range(NARROW_VOCABULARY)])
    writer.add_token_types([1] * NARROW_VOCABULARY)
    writer.add_token_merges(["! !"])
    for name, shape in shapes(metadata, NARROW_VOCABULARY):
        plain = len(shape) == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, np.broadcast_to(np.zeros((), np.float32 if plain else np.float16), shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Params(c.Structure):
    """llama_model_quantize_params, and room: a struct returned and passed through memory may be larger than the real one."""

    _fields_ = (("threads", c.c_int32), ("file_type", c.c_int32), ("rest", c.c_uint8 * 1016))


def quantize(source: Path, target: Path) -> None:
    bins = Path(os.environ["LLAMA_BINS"])
    c.CDLL(str(bins / "libggml-base.so"), c.RTLD_GLOBAL)
    ggml = c.CDLL(str(bins / "libggml.v0.5.0.so"), c.RTLD_GLOBAL)
    ggml.ggml_backend_load.restype = c.c_void_p
    assert ggml.ggml_backend_load(str(bins / "libggml-cpu-haswell.so").encode())
    llama = c.CDLL(str(bins / "libllama.v0.5.0.so"), c.RTLD_GLOBAL)
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Params)]
    params = llama.llama_model_quantize_default_params()
    assert params.file_type == 7, "another llama.cpp: its default file type was 7, Q8_0"
    params.threads, params.file_type = 1, Q4_K_M
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "f16.gguf"), Path(folder, "q4_k_m.gguf")
        write_zeros(source, METADATA | NARROW)
        quantize(source, target)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    tensors = [[name, types.pop(name), list(shape)] for name, shape in shapes(METADATA, VOCABULARY)]
    assert not types, types
    rows = ",\n".join(json.dumps(tensor) for tensor in tensors)
    OUT.write_text(f'{{"metadata": {json.dumps(METADATA, indent=1)},\n"tensors": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
