"""Writes model files of random weights, as large as real ones, in minutes and little memory: Qwen3-MoE, Qwen3.5-MoE, gpt-oss.

    python -m benchmarks.make_synthetic OUT.gguf --shape qwen3-30b-a3b

Tensors and keys are those of the family's table, so that llama.cpp loads the file, too. The weights are valid blocks with
scales that keep logits finite. Random bytes are slow to make, so experts are copied from a pool of blocks per format, in runs
that begin at random places; all other matrices are made afresh. `--mix q4_k_m` and `--mix mxfp4` are llama.cpp's recipes;
`q4_k` and so on give every matrix that one format. The tokenizer has the 256 bytes, a few merges and special tokens; all other
ids are made-up words, so any output is text.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import time
from pathlib import Path

import gguf
import numpy as np

from benchmarks.tensors import WHERE, FormatOf, family_of, mxfp4, q4_k_m, tensors
from ferrum_jax.config import Attention, GatedDeltaNet, LayerSpec, Mixture, ModelConfig, Rope, RopeScaling
from ferrum_jax.convert import add_metadata
from ferrum_jax.files.metadata import Typed
from ferrum_jax.files.tensor_info import TensorInfo
from pallas_kernels.blocks.synthetic import random_blocks

# Mean and standard deviation of the weights by the name of the parameter. Each token must outweigh what the layers add, or all
# positions end with nearly the same logits.
NORMAL = {"embedding": (0.0, 1.0), "taps": (0.0, 0.5), "decay": (-2.0, 0.5), "time_bias": (-1.0, 1.0)}
NORMAL |= dict.fromkeys(("output", "expert_down", "shared_down"), (0.0, 0.01))
OTHER, NORMS = (0.0, 0.03), (1.0, 0.1)
POOL_BYTES = 16 << 20
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["i n", "o n", "e r", "r e", "a n", "an d", "t h", "th e", "Ġ t", "Ġ a", "Ġt h", "Ġth e"]
CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def moe(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, mixture: Mixture, vocab: int) -> ModelConfig:
    """Of Qwen3-MoE."""
    spec = LayerSpec(Attention(heads, kv_heads, head_dim, Rope(1e6, head_dim)), mixture)
    return model_of("qwen3moe", hidden, vocab, [spec] * layers)


def hybrid(layers: int, hidden: int, heads: int, net: GatedDeltaNet, mixture: Mixture, vocab: int) -> ModelConfig:
    """Of Qwen3.5-MoE: every fourth layer attends, the others have `net`."""
    attention = Attention(heads, 2, 256, Rope(1e7, 64), gated=True)
    specs = [LayerSpec(net if (number + 1) % 4 else attention, mixture) for number in range(layers)]
    return model_of("qwen35moe", hidden, vocab, specs)


def with_sinks(layers: int, hidden: int, heads: int, kv_heads: int, mixture: Mixture, vocab: int) -> ModelConfig:
    """Of gpt-oss: every other layer has a window."""
    yarn = RopeScaling("yarn", 32.0, 4096, attention_factor=0.1 * math.log(32) + 1, truncate=False)
    attention = Attention(heads, kv_heads, 64, Rope(150_000.0, 64, yarn), sinks=True)
    mixture = dataclasses.replace(mixture, limit=7.0, alpha=1.702)
    specs = [LayerSpec(dataclasses.replace(attention, window=128 * (number % 2 == 0)), mixture) for number in range(layers)]
    return model_of("gpt-oss", hidden, vocab, specs)


def model_of(architecture: str, hidden: int, vocab: int, layers: list[LayerSpec]) -> ModelConfig:
    facts = {"architecture": architecture, "hidden_size": hidden, "vocab_size": vocab, "context_length": 40960}
    return ModelConfig(**facts, rms_norm_eps=1e-6, layers=layers)


def experts(count: int, used: int, width: int, shared: int = 0) -> Mixture:
    return Mixture(count, used, width, normalize=True, shared_width=shared)


SHAPES = {
    "qwen3-30b-a3b": moe(48, 2048, 32, 4, 128, experts(128, 8, 768), 151_936),
    "qwen3-moe-2g": moe(12, 2048, 32, 4, 128, experts(64, 8, 512), 151_936),
    "qwen3-moe-600m": moe(8, 1024, 16, 4, 128, experts(64, 8, 512), 65_536),
    "qwen3-moe-tiny": moe(2, 256, 4, 2, 64, experts(4, 2, 256), 4096),
    "qwen35-moe-8g": hybrid(16, 2048, 16, GatedDeltaNet(16, 32, 128, 128, 4, True), experts(256, 8, 512, 512), 248_320),
    "qwen35-moe-1g": hybrid(12, 1024, 8, GatedDeltaNet(8, 16, 128, 128, 4, True), experts(64, 8, 512, 512), 65_536),
    "qwen35-moe-tiny": hybrid(4, 256, 2, GatedDeltaNet(2, 4, 128, 128, 4, True), experts(4, 2, 256, 256), 4096),
    "gpt-oss-20b": with_sinks(24, 2880, 64, 8, experts(32, 4, 2880), 201_088),
    "gpt-oss-1g": with_sinks(8, 1440, 32, 4, experts(32, 4, 1440), 65_536),
    "gpt-oss-tiny": with_sinks(2, 96, 4, 2, experts(4, 2, 64), 4096),
}


def all_in(format: str) -> FormatOf:
    return lambda name, layer, config: format


# By mix: the format of each matrix, and llama.cpp's `general.file_type`.
MIXES = {"q4_k_m": (q4_k_m, 15), "mxfp4": (mxfp4, 38), "q4_k": (all_in("Q4_K"), 15)}
MIXES |= {"q6_k": (all_in("Q6_K"), 18), "q8_0": (all_in("Q8_0"), 7)}


class Blocks:
    """Random tensor data; the pools are made on first use."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pools: dict[tuple[str, float], np.ndarray] = {}

    def data(self, tensor: TensorInfo, parameter: str) -> np.ndarray:
        """The bytes of a tensor, which is the parameter of this name: uint8 [nbytes]."""
        mean, std = NORMS if parameter.endswith("norm") else NORMAL.get(parameter, OTHER)
        if tensor.format == "F32":
            values = self.rng.normal(mean, std, tensor.shape).astype("<f4")
            return (-np.exp(values) if parameter == "decay" else values).reshape(-1).view(np.uint8)
        if len(tensor.shape) == 2:
            return self.fresh(tensor.format, std, tensor.nbytes).reshape(-1)
        return self.tiled(tensor.format, std, tensor.nbytes)

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


def tokenizer_metadata(vocab: int) -> dict[str, Typed]:
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    words = [f"Ġw{index}" for index in range(vocab - len(tokens) - len(SPECIALS))]
    first_special = vocab - len(SPECIALS)
    types = np.full(vocab, gguf.TokenType.NORMAL, np.int32)
    types[first_special:] = gguf.TokenType.CONTROL
    ids = {"bos": first_special, "padding": first_special, "eos": first_special + 2}
    return {
        "tokenizer.ggml.model": Typed("gpt2", "string"),
        "tokenizer.ggml.pre": Typed("qwen2", "string"),
        "tokenizer.ggml.tokens": Typed(tokens + words + SPECIALS, "array string"),
        "tokenizer.ggml.token_type": Typed(types, "array int32"),
        "tokenizer.ggml.merges": Typed(MERGES, "array string"),
        **{f"tokenizer.ggml.{name}_token_id": Typed(value, "uint32") for name, value in ids.items()},
        "tokenizer.ggml.add_bos_token": Typed(False, "bool"),
        "tokenizer.chat_template": Typed(CHAT_TEMPLATE, "string"),
    }


def metadata(config: ModelConfig, name: str, mix: str) -> dict[str, Typed]:
    to_gguf = family_of(config).to_gguf
    assert to_gguf is not None
    return {
        "general.architecture": Typed(config.architecture, "string"),
        "general.type": Typed("model", "string"),
        "general.name": Typed(f"synthetic {name} {mix}", "string"),
        "general.file_type": Typed(MIXES[mix][1], "uint32"),
        "general.quantization_version": Typed(gguf.GGML_QUANT_VERSION, "uint32"),
        **to_gguf(config, str(WHERE)),
        **tokenizer_metadata(config.vocab_size),
    }


def make(out: Path, name: str, mix: str = "", layers: int | None = None, seed: int = 0) -> None:
    """Writes the model `name` of SHAPES to `out`, whole or not at all. mix: "" is the usual one of its family; `layers`
    replaces the number of its layers."""
    config = SHAPES[name]
    mix = mix or ("mxfp4" if config.architecture == "gpt-oss" else "q4_k_m")
    if layers is not None:
        config = dataclasses.replace(config, layers=tuple(itertools.islice(itertools.cycle(config.layers), layers)))
    blocks, table = Blocks(np.random.default_rng(seed)), family_of(config).tensors
    found = tensors(config, MIXES[mix][0])
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, config.architecture)
    add_metadata(writer, metadata(config, name, mix))
    for tensor in found:
        kind = gguf.GGMLQuantizationType[tensor.format]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in found:
            row, _ = table.find(tensor.name)
            assert row is not None
            writer.write_tensor_data(blocks.data(tensor, row.path[-1]))
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic GGUF file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mix", choices=MIXES, default="", help="default: mxfp4 for gpt-oss, else q4_k_m")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    make(options.out, options.shape, options.mix, options.layers, options.seed)
    seconds = time.perf_counter() - start
    print(f"{options.out}: {options.out.stat().st_size:,} bytes in {seconds:.1f} s")


if __name__ == "__main__":
    main()
