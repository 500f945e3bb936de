"""Tiny random GGUF models of the real architectures, the same bytes on every machine.

A file is a function of its `Spec` alone: weights come from the raw 64-bit stream of PCG64 (which NumPy keeps stable) by integer
sums and correctly rounded float32 operations, each tensor from a separate stream. Formats that gguf-py can quantize are
quantized by it; the others are random valid blocks whose float16 scales give the wanted spread. So a test needs only NumPy and
gguf, and its golden numbers are tied to the file by `digest`.

The numbers are chosen so that mistakes show: head_dim is not hidden / heads, norm weights and biases are far from 1 and
0, embeddings are small enough that eps matters in the first norm, and logits have a spread of about 3.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

# Formats made of random blocks: byte offset of the float16 scale, spread of the weights when that scale is 1, byte
# offset of the float16 minimum and the multiple of the scale that centers the weights, whether scales may be negative.
RANDOM_BLOCKS = {
    "Q2_K": (80, 13.8, 82, 1.5, False),
    "Q3_K": (108, 43.3, None, 0.0, True),
    "Q4_K": (0, 257.0, 2, 7.5, False),
    "Q5_K": (0, 527.0, 2, 15.5, False),
    "Q6_K": (208, 1357.0, None, 0.0, True),
    "IQ2_XXS": (0, 53.5, None, 0.0, False),
    "IQ2_XS": (0, 55.9, None, 0.0, False),
    "IQ2_S": (0, 56.5, None, 0.0, False),
    "IQ3_XXS": (0, 142.0, None, 0.0, False),
    "IQ3_S": (0, 140.0, None, 0.0, False),
    "IQ1_S": (0, 7.2, None, 0.0, False),
    "IQ1_M": (None, 7.2, None, 0.0, False),
    "IQ4_NL": (0, 67.2, None, 0.0, True),
    "IQ4_XS": (0, 1255.0, None, 0.0, True),
    "NVFP4": (None, 1.0, None, 0.0, False),
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


@dataclass(frozen=True)
class Spec:
    """What a tiny model is.

    `formats` maps a kind of matrix (embd, output, q, k, v, o, gate, up, down; "*" for the rest) to ggml type names,
    taken in turn by layer. `rope` is None or (type, factor, original context length).
    """

    name: str
    arch: str
    layers: int = 3
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    ff: int = 512
    expert_ff: int = 256
    experts: int = 0
    top_k: int = 0
    vocab: int = 320
    context: int = 512
    tied: bool = False
    attention_bias: bool = False
    eps: float = 1e-5
    theta: float = 10000.0
    window: int = 0
    rope: tuple[str, float, int] | None = None
    weights_norm: bool | None = None
    weights_scale: float | None = None
    formats: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 1

    def format_of(self, kind: str, layer: int) -> str:
        """The ggml type name of this kind of matrix in this layer."""
        names = self.formats.get(kind, self.formats.get("*", ("F32",)))
        return names[layer % len(names)]


def raw(spec_seed: int, name: str, count: int) -> np.ndarray:
    """uint64 [count]: the stream of the tensor `name` in files with this seed."""
    return np.random.PCG64([spec_seed, zlib.crc32(name.encode())]).random_raw(count)


def bell(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of mean 0 and standard deviation 1: sums of four 16-bit integers, divided once."""
    parts = raw(seed, name, math.prod(shape)).astype("<u8").view("<u2").reshape(-1, 4).astype(np.int32)
    return ((parts.sum(axis=1) - 131070).astype(np.float32) / np.float32(37837)).reshape(shape)


def between(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """float32 values spread evenly over [low, high)."""
    unit = (raw(seed, name, math.prod(shape)) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return (np.float32(low) + unit * np.float32(high - low)).reshape(shape)


def random_blocks(seed: int, name: str, shape: tuple[int, ...], format: str, std: float, quiet: int) -> np.ndarray:
    """uint8 [..., bytes of a row]: random blocks of `format` whose weights have a standard deviation near `std`.

    The last `quiet` rows are 16 times smaller.
    """
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    count = math.prod(shape) // block
    bits = raw(seed, name, -(-count * size // 8)).astype("<u8").view(np.uint8)
    data = bits[: count * size].reshape(count, size).copy()
    dice = raw(seed, name + "/scale", count)
    offset, spread, min_offset, min_ratio, signed = RANDOM_BLOCKS[format]
    scale = np.float32(std / spread) * (np.float32(0.75) + (dice % 4).astype(np.float32) / np.float32(4))
    if signed:
        scale = np.where(dice >> np.uint64(61) == 0, -scale, scale)  # one in eight
    quiet_blocks = quiet * shape[-1] // block
    scale[count - quiet_blocks :] /= np.float32(16)
    half = scale.astype("<f2")
    if format == "IQ1_M":  # four bits of the scale in the top of each of the last four 16-bit words
        word = half.view("<u2")
        for i in range(4):
            data[:, 49 + 2 * i] = (data[:, 49 + 2 * i] & 0x0F) | (((word >> (4 * i)) & 15) << 4).astype(np.uint8)
    elif format == "NVFP4":  # four unsigned E4M3 scales first: exponents that give 2^-7 to 2^-5
        data[:, :4] = 0x08 + (data[:, :4] & 0x0F)
    else:
        data[:, offset : offset + 2] = half[:, None].view(np.uint8)
        if min_offset is not None:
            data[:, min_offset : min_offset + 2] = (scale * np.float32(min_ratio)).astype("<f2")[:, None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def matrix(spec: Spec, name: str, shape: tuple[int, ...], std: float, format: str) -> tuple[np.ndarray, str]:
    """A weight in `format`: its array as gguf's writer takes it (float32 or bytes) and the type name.

    The output rows of the special tokens are small, so that greedy decoding never takes one.
    """
    quiet = len(SPECIALS) if name == ("token_embd.weight" if spec.tied else "output.weight") else 0
    if format in RANDOM_BLOCKS:
        return random_blocks(spec.seed, name, shape, format, std, quiet), format
    values = bell(spec.seed, name, shape) * np.float32(std)
    values[shape[0] - quiet :] /= np.float32(16)
    if format == "F32":
        return values, format
    if format == "F16":
        return values.astype(np.float16), format
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[format]), format


def llama3_factors(spec: Spec) -> np.ndarray:
    """float32 [head_dim / 2]: LLaMA-3.1's divisors of the rotary frequencies (low and high factors 1 and 4)."""
    assert spec.rope is not None
    _, factor, original = spec.rope
    out = []
    for i in range(spec.head_dim // 2):
        wavelength = 2 * math.pi * spec.theta ** (2 * i / spec.head_dim)
        smooth = min(max((original / wavelength - 1.0) / 3.0, 0.0), 1.0)
        out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def tensors(spec: Spec) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of the file in order: name, array (float32, float16 or bytes), ggml type name."""
    s, h, hd = spec, spec.hidden, spec.head_dim
    root = 1 / math.sqrt(h)

    def norm(name: str, size: int, low: float = 0.4, high: float = 1.6) -> tuple[str, np.ndarray, str]:
        return name, between(s.seed, name, (size,), low, high), "F32"

    def bias(name: str, size: int) -> tuple[str, np.ndarray, str]:
        return name, bell(s.seed, name, (size,)) * np.float32(0.5), "F32"

    def weight(name: str, kind: str, layer: int, shape: tuple[int, ...], std: float) -> tuple[str, np.ndarray, str]:
        return name, *matrix(s, name, shape, std, s.format_of(kind, layer))

    yield weight("token_embd.weight", "embd", 0, (s.vocab, h), 2.8 * root if s.tied else 0.05)
    yield norm("output_norm.weight", h)
    if not s.tied:
        yield weight("output.weight", "output", 0, (s.vocab, h), 2.8 * root)
    if s.rope and s.rope[0] == "llama3":
        yield "rope_freqs.weight", llama3_factors(s), "F32"
    for n in range(s.layers):
        b = f"blk.{n}."
        yield norm(b + "attn_norm.weight", h)
        for x, rows in (("q", s.heads * hd), ("k", s.kv_heads * hd), ("v", s.kv_heads * hd)):
            yield weight(b + f"attn_{x}.weight", x, n, (rows, h), (1.0 if x == "v" else 1.3) * root)
            if s.arch == "qwen2" or s.attention_bias:
                yield bias(b + f"attn_{x}.bias", rows)
        yield weight(b + "attn_output.weight", "o", n, (h, s.heads * hd), 1.2 / math.sqrt(s.heads * hd))
        if s.attention_bias:
            yield bias(b + "attn_output.bias", h)
        if s.arch in ("qwen3", "qwen3moe"):
            yield norm(b + "attn_q_norm.weight", hd, 0.5, 2.0)
            yield norm(b + "attn_k_norm.weight", hd, 0.5, 2.0)
        oss = s.arch == "gpt-oss"
        if oss:
            yield b + "attn_sinks.weight", bell(s.seed, b + "sinks", (s.heads,)) * np.float32(2), "F32"
        yield norm(b + ("post_attention_norm.weight" if oss else "ffn_norm.weight"), h)
        ff = s.expert_ff if s.arch in ("qwen3moe", "gpt-oss") else s.ff
        lead, tail = ((s.experts,), "_exps.weight") if s.experts else ((), ".weight")
        if s.experts:
            yield b + "ffn_gate_inp.weight", bell(s.seed, b + "router", (s.experts, h)) * np.float32(1.5 * root), "F32"
        if oss:
            yield bias(b + "ffn_gate_inp.bias", s.experts)
            for x, rows in (("gate", ff), ("up", ff), ("down", h)):
                name = f"{b}ffn_{x}_exps.bias"
                yield name, bell(s.seed, name, (s.experts, rows)) * np.float32(0.5), "F32"
        wide = (4.0 if oss else 1.3) * root  # of gpt-oss beyond the limit of its SwiGLU
        yield weight(b + "ffn_gate" + tail, "gate", n, (*lead, ff, h), wide)
        yield weight(b + "ffn_up" + tail, "up", n, (*lead, ff, h), wide)
        yield weight(b + "ffn_down" + tail, "down", n, (*lead, h, ff), (0.4 if oss else 1.5) / math.sqrt(ff))


def bytes_to_unicode() -> list[str]:
    """The printable stand-in of each byte in GPT-2's byte-level vocabulary."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def add_tokenizer(w: gguf.GGUFWriter, vocab: int) -> None:
    """A byte-level BPE whose last tokens are `SPECIALS`."""
    letters = bytes_to_unicode()
    pairs = [(a, b) for a in "etaoinsh" for b in "etaoinsh"][: vocab - 256 - len(SPECIALS)]
    tokens = [*letters, *(a + b for a, b in pairs)]
    tokens += [f"<|extra_{i}|>" for i in range(vocab - len(tokens) - len(SPECIALS))] + list(SPECIALS)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if len(t) > 2 else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([f"{a} {b}" for a, b in pairs])
    w.add_eos_token_id(vocab - 4)
    w.add_pad_token_id(vocab - 1)
    w.add_add_bos_token(False)


def write(spec: Spec, path: Path) -> str:
    """Write the file and return its digest: sha256 over every tensor's name, type, shape and bytes."""
    s = spec
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(s.name)
    w.add_block_count(s.layers)
    w.add_context_length(s.context)
    w.add_embedding_length(s.hidden)
    w.add_feed_forward_length(s.ff)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    if s.arch != "qwen2":  # files of Qwen2 have neither: hidden / heads holds there
        w.add_key_length(s.head_dim)
        w.add_value_length(s.head_dim)
        w.add_rope_dimension_count(s.head_dim)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.theta)
    w.add_vocab_size(s.vocab)
    w.add_file_type(0)
    if s.experts:
        w.add_expert_count(s.experts)
        w.add_expert_used_count(s.top_k)
    if s.arch in ("qwen3moe", "gpt-oss"):
        w.add_expert_feed_forward_length(s.expert_ff)
    if s.weights_norm is not None:
        w.add_expert_weights_norm(s.weights_norm)
    if s.weights_scale is not None:
        w.add_expert_weights_scale(s.weights_scale)
    if s.window:
        w.add_sliding_window(s.window)
    if s.rope and s.rope[0] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(s.rope[0]))
        w.add_rope_scaling_factor(s.rope[1])
        w.add_rope_scaling_orig_ctx_len(s.rope[2])

    add_tokenizer(w, s.vocab)
    digest = hashlib.sha256()
    for name, array, format in tensors(s):
        digest.update(f"{name} {format} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        kind = None if array.dtype != np.uint8 else gguf.GGMLQuantizationType[format]
        w.add_tensor(name, array, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return digest.hexdigest()


def prompts(vocab: int, seed: int = 7, lengths: tuple[int, ...] = (1, 17, 130)) -> list[list[int]]:
    """Prompts of 1, 17 and 130 token ids; the longer ones repeat a stretch of themselves. No special tokens."""
    out = []
    for length in lengths:
        ids = [int(x) for x in raw(seed, f"prompt {length}", length) % np.uint64(vocab - len(SPECIALS))]
        third = length // 3
        ids[length - third :] = ids[:third]
        out.append(ids)
    return out
