"""Writes Qwen3-MoE model files of random weights, as large as real ones, in minutes and little memory.

    python -m benchmarks.make_synthetic OUT.gguf --shape qwen3-30b-a3b

The weights are valid blocks with scales that keep logits finite. Random bytes are slow to make, so experts are copied from a
pool of blocks per format, in runs that begin at random places; all other matrices are made afresh. `--mix q4_k_m` is
llama.cpp's recipe; `q4_k` and so on give every matrix that one format. The tokenizer has the 256 bytes, a few merges and
special tokens; all other ids are made-up words, so any output is text.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from benchmarks.tensors import more_bits
from pallas_kernels.blocks.synthetic import random_blocks

WEIGHT_STD = 0.03
# Each token must outweigh what the layers add, or all positions end with nearly the same logits.
STDS = {"token_embd": 1.0, "attn_output": 0.01, "ffn_down_exps": 0.01}
POOL_BYTES = 16 << 20
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["i n", "o n", "e r", "r e", "a n", "an d", "t h", "th e", "Ġ t", "Ġ a", "Ġt h", "Ġth e"]
CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_used: int
    expert_ffn: int
    vocab: int
    context: int = 40960


SHAPES = {
    "qwen3-30b-a3b": Shape(48, 2048, 32, 4, 128, experts=128, experts_used=8, expert_ffn=768, vocab=151936),
    "qwen3-moe-2g": Shape(12, 2048, 32, 4, 128, experts=64, experts_used=8, expert_ffn=512, vocab=151936),
    "qwen3-moe-600m": Shape(8, 1024, 16, 4, 128, experts=64, experts_used=8, expert_ffn=512, vocab=65536),
    "qwen3-moe-tiny": Shape(2, 256, 4, 2, 64, experts=4, experts_used=2, expert_ffn=256, vocab=4096),
}
FILE_TYPES = {"q4_k_m": 15, "q4_k": 15, "q6_k": 18, "q8_0": 7}  # llama.cpp's `general.file_type`


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `shape` has the slowest axis first."""

    name: str
    shape: tuple[int, ...]
    format: str

    @property
    def nbytes(self) -> int:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.format]]
        return int(np.prod(self.shape)) // block_size * block_bytes

    @property
    def std(self) -> float:
        """Standard deviation of the weights."""
        return STDS.get(self.name.split(".")[-2], WEIGHT_STD)


def list_tensors(shape: Shape, mix: str) -> Iterator[Tensor]:
    def matrix(name: str, *axes: int, large: bool = False) -> Tensor:
        if mix == "q4_k_m":
            return Tensor(name, axes, "Q6_K" if large else "Q4_K")
        return Tensor(name, axes, mix.upper())

    s = shape
    yield matrix("token_embd.weight", s.vocab, s.hidden)
    for layer in range(s.layers):
        name = f"blk.{layer}.{{}}.weight".format
        large = more_bits(layer, s.layers)
        yield Tensor(name("attn_norm"), (s.hidden,), "F32")
        yield matrix(name("attn_q"), s.heads * s.head_dim, s.hidden)
        yield matrix(name("attn_k"), s.kv_heads * s.head_dim, s.hidden)
        yield matrix(name("attn_v"), s.kv_heads * s.head_dim, s.hidden, large=large)
        yield matrix(name("attn_output"), s.hidden, s.heads * s.head_dim)
        yield Tensor(name("attn_q_norm"), (s.head_dim,), "F32")
        yield Tensor(name("attn_k_norm"), (s.head_dim,), "F32")
        yield Tensor(name("ffn_norm"), (s.hidden,), "F32")
        yield Tensor(name("ffn_gate_inp"), (s.experts, s.hidden), "F32")
        yield matrix(name("ffn_gate_exps"), s.experts, s.expert_ffn, s.hidden)
        yield matrix(name("ffn_up_exps"), s.experts, s.expert_ffn, s.hidden)
        yield matrix(name("ffn_down_exps"), s.experts, s.hidden, s.expert_ffn, large=large)
    yield Tensor("output_norm.weight", (s.hidden,), "F32")
    yield matrix("output.weight", s.vocab, s.hidden, large=True)


class Blocks:
    """Random tensor data; the pools are made on first use."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pools: dict[tuple[str, float], np.ndarray] = {}

    def data(self, tensor: Tensor) -> np.ndarray:
        """The bytes of the tensor, uint8 [nbytes]; float32 tensors are norms (near 1) or the router."""
        if tensor.format == "F32":
            mean, std = (1.0, 0.1) if len(tensor.shape) == 1 else (0.0, tensor.std)
            return self.rng.normal(mean, std, tensor.shape).astype("<f4").reshape(-1).view(np.uint8)
        if len(tensor.shape) == 2:
            return self.fresh(tensor.format, tensor.std, tensor.nbytes).reshape(-1)
        return self.tiled(tensor.format, tensor.std, tensor.nbytes)

    def fresh(self, format: str, std: float, nbytes: int) -> np.ndarray:
        """New blocks, uint8 [blocks, block_bytes]."""
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
        out = np.empty((nbytes // block_bytes, block_bytes), np.uint8)
        step = POOL_BYTES // block_bytes
        for start in range(0, len(out), step):
            part = out[start : start + step]
            part[:] = random_blocks(format, len(part), block_size, self.rng, std)
        return out

    def tiled(self, format: str, std: float, nbytes: int) -> np.ndarray:
        """Runs of blocks from random places of the pool, uint8 [nbytes]."""
        if (format, std) not in self.pools:
            self.pools[format, std] = self.fresh(format, std, POOL_BYTES)
        pool = self.pools[format, std]
        out = np.empty((nbytes // pool.shape[1], pool.shape[1]), np.uint8)
        filled = 0
        while filled < len(out):
            run = pool[self.rng.integers(len(pool)) :][: len(out) - filled]
            out[filled : filled + len(run)] = run
            filled += len(run)
        return out.reshape(-1)


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    words = [f"Ġw{index}" for index in range(vocab - len(tokens) - len(SPECIALS))]
    first_special = vocab - len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + words + SPECIALS)
    writer.add_token_types([gguf.TokenType.NORMAL] * first_special + [gguf.TokenType.CONTROL] * len(SPECIALS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(first_special)
    writer.add_pad_token_id(first_special)
    writer.add_eos_token_id(first_special + 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_metadata(writer: gguf.GGUFWriter, name: str, shape: Shape, mix: str) -> None:
    writer.add_type("model")
    writer.add_name(f"synthetic {name} {mix}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_ffn * shape.experts_used)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_used)
    writer.add_expert_feed_forward_length(shape.expert_ffn)
    writer.add_file_type(FILE_TYPES[mix])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def make(out: Path, name: str, mix: str = "q4_k_m", layers: int | None = None, seed: int = 0) -> None:
    """Writes the model `name` of SHAPES to `out`, whole or not at all; `layers` replaces the number of its layers."""
    shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
    blocks = Blocks(np.random.default_rng(seed))
    tensors = list(list_tensors(shape, mix))
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    add_metadata(writer, name, shape, mix)
    add_tokenizer(writer, shape.vocab)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.format]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(blocks.data(tensor))
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic Qwen3-MoE GGUF file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mix", choices=FILE_TYPES, default="q4_k_m")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    make(options.out, options.shape, options.mix, options.layers, options.seed)
    seconds = time.perf_counter() - start
    print(f"{options.out}: {options.out.stat().st_size:,} bytes in {seconds:.1f} s")


if __name__ == "__main__":
    main()
